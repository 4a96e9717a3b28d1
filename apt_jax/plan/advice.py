"""What the modelled time of an update asks of the launch: the watchdog's patience, the grace before
a preemption."""

from __future__ import annotations

import math
from typing import Any

MARGIN = 2.0  # the model counts neither compilation nor data, and rates are data-sheet figures
LONG = 300.0  # seconds of an update from which the usual grace of minutes may be too short
CHECKPOINT = 300.0  # seconds that a checkpoint is given beside the update: assumed, not modelled


def launch_notes(config: Any, devices: int, update: float) -> tuple[str, ...]:
    """Lines for a run whose updates are long.

    Args:
      config: its config; train.first_step_seconds and train.hang_seconds are read.
      devices: of the run; the watchdog looks after several only.
      update: modelled seconds of one update, all steps of the stage over the whole batch.
    """
    notes, train = [], config.train
    patience = max(train.first_step_seconds, train.hang_seconds)
    if devices > 1 and train.hang_seconds and MARGIN * update > patience:
        notes.append(
            f"an update is modelled at {update:,.0f} s, the watchdog ends a first one after "
            f"{patience:,.0f} s and has seen none to go by: set --config.train.first_step_seconds="
            f"{_up(MARGIN * update, 600)}")
    if update > LONG:
        notes.append(
            f"an update is modelled at {update:,.0f} s: to save before a preemption the job needs "
            f"a grace of {_up(update + CHECKPOINT, 60)} s, an update and a checkpoint (Slurm's "
            "--signal=B:USR1@SECONDS, terminationGracePeriodSeconds on GKE); where it gets less, "
            "the last checkpoint counts")
    return tuple(notes)


def _up(seconds: float, unit: int) -> int:
    return math.ceil(seconds / unit) * unit
