"""Checkpoints of everything a run is, by Orbax, asynchronously.

RUN/checkpoints/<step>/state holds the arrays of `train/state.py`, .../meta the config, the data
position and the seconds trained. A restore returns the state; there is no way to restore "into"
something and throw it away.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from apt_jax.config import config_from_json, config_to_json
from apt_jax.errors import UserError
from apt_jax.installed import versions_of
from apt_jax.train.course import check_course
from apt_jax.train.disk import run_disk
from apt_jax.train.distributed import check_shared, everywhere, same_everywhere
from apt_jax.train.rescheduled import as_saved, as_today
from apt_jax.weights import CHECKPOINTS, CONFIG_FILE
from apt_jax.weights.runs import may_be_whole

BROKEN = "broken_checkpoints"
STATE, META = "state", "meta"

# A state up to SMALL bytes is cut into files below FILE_BYTES, which any transfer takes; larger
# ones into the library's own 2 GB files.
SMALL, FILE_BYTES, CHUNK_BYTES = 2**30, 12 * 2**20, 4 * 2**20

# The copies of an array share its writing where a part has this many bytes: each part of each
# shape is a compiled program, which for norms and biases is what a first save would wait for.
SHARED_WRITING = 2**20

# What a process says of a checkpoint.
GOOD, BROKEN_HERE, OTHER, NOT_NOW = range(4)


class Restored(NamedTuple):
    state: dict[str, Any]
    step: int
    seconds: float  # trained before, over all attempts


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, workdir: str | Path, config: Any, say: Callable[[str], None] = print):
        """Opens (and makes) WORKDIR/checkpoints; `say` takes one-line warnings.

        UserError, before anything of the run is written, where not all processes see one folder,
        or it cannot be made.
        """
        # Orbax reports every phase of every save at INFO, and a torn folder at WARNING; asyncio
        # each of the many files that a full disk did not take.
        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self._workdir = Path(workdir).resolve()
        self._folder = self._workdir / CHECKPOINTS
        self._config, self._say = config, say
        with run_disk(self._folder, opening=True):
            check_shared(self._folder, max(self._on_disk(), default=-1))
            self._manager = self._open()

    def _on_disk(self) -> list[int]:
        """The steps whose folders this process sees, before the manager is asked."""
        if not self._folder.is_dir():
            return []
        return [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]

    def _open(self) -> ocp.CheckpointManager:
        self._folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(
            self._folder,
            item_handlers={STATE: _state_handler(),
                           META: ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._config.train.keep, cleanup_tmp_directories=True,
                enable_async_checkpointing=True))

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: dict[str, Any], data: Mapping[str, Any],
             seconds: float) -> None:
        """Starts to write `state`; it may be donated as soon as this returns.

        Args:
          step: finished updates.
          data: the data position, JSON-able.
          seconds: trained so far.

        UserError where the disk did not take this one or one that was still being written.
        """
        if step in self._manager.all_steps():
            return
        meta = {"step": step, "data": dict(data), "seconds": seconds,
                "config": config_to_json(self._config)}
        small = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= SMALL
        arguments = ocp.args.PyTreeSave(
            state,
            save_args=(jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
                       if small else None),
            ocdbt_target_data_file_size=FILE_BYTES if small else None)
        with run_disk(self._folder):
            self._manager.save(step, args=ocp.args.Composite(
                **{STATE: arguments, META: ocp.args.JsonSave(meta)}))

    def restore(self, abstract: dict[str, Any]) -> Restored | None:
        """The newest checkpoint that can be read, on the shardings of `abstract`; None if there
        is none at all.

        Unreadable ones newer than it are moved to WORKDIR/broken_checkpoints with a warning.
        UserError for a checkpoint of another config, one that may not be read, or if none of
        several can be. What may pass, such as a stale handle or too little memory, is raised as it
        is: the checkpoint may be whole, and nothing is moved.
        """
        seen = sorted(self._manager.all_steps(), reverse=True)
        steps = same_everywhere(seen)
        latest = everywhere(seen[0] if seen else -1)
        if not steps and max(latest) >= 0:
            raise UserError(f"the processes see no common checkpoint in {self._folder} (the newest "
                            f"of each, in their order: {latest}; -1: none); have all see the same "
                            "storage, and start again")
        broken: dict[int, str] = {}
        for step in steps:
            restored = problem = later = None
            try:
                restored = self._read(step, abstract)
            except UserError as error:
                problem = error
            except Exception as error:  # whatever a torn folder makes the reader raise
                if may_be_whole(error):
                    later = error
                broken[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            # A torn file hurts those processes alone whose part it holds; all take the same way.
            found = everywhere(OTHER if problem else NOT_NOW if later else
                               BROKEN_HERE if step in broken else GOOD)
            if problem:
                raise problem
            if later:
                later.add_note(f"{self._folder}/{step} could not be read, which says nothing about "
                               "its files: nothing was moved or changed")
                raise later
            if OTHER in found:
                raise UserError(f"another process refused {self._folder}/{step}; its line says why")
            if NOT_NOW in found:
                raise RuntimeError(f"process {found.index(NOT_NOW)} could not read {self._folder}/"
                                   f"{step} just now; its lines say why")
            if BROKEN_HERE in found:
                broken.setdefault(step, f"process {found.index(BROKEN_HERE)} cannot read its part")
                del restored
                continue
            if broken:
                self._set_aside(broken, step)
            return restored
        if broken:
            raise UserError(f"none of the checkpoints in {self._folder} can be read (step "
                            f"{steps[0]}: {broken[steps[0]]}); move that folder away to start anew")
        return None

    def _read(self, step: int, abstract: dict[str, Any]) -> Restored:
        """One checkpoint by the handlers themselves: the manager would wait for all processes to
        succeed, for ever where one does not."""
        folder = self._manager.directory / str(step)
        with run_disk(self._folder / str(step), doing="read"):
            return self._read_from(folder, step, abstract)

    def _read_from(self, folder: Any, step: int, abstract: dict[str, Any]) -> Restored:
        meta = ocp.JsonCheckpointHandler().restore(folder / META, args=ocp.args.JsonRestore())
        saved = config_from_json(meta["config"])
        self._check(saved, step)
        state = as_today(ocp.PyTreeCheckpointHandler().restore(folder / STATE, args=_restore_args(
            as_saved(abstract, self._config, saved))), abstract)
        if int(state["step"]) != step:
            raise ValueError(f"it holds step {int(state['step'])}")
        return Restored(state, step, float(meta["seconds"]))

    def _check(self, saved: Any, step: int) -> None:
        for line in check_course(saved, self._config, step, self._workdir):
            self._say(f"warning: the checkpoint was trained with another {line}")

    def _set_aside(self, broken: Mapping[int, str], good: int) -> None:
        """Moves unreadable checkpoints away, so that their steps can be saved again."""
        self._manager.close()
        for step, reason in broken.items():
            target = self._workdir / BROKEN / str(step)
            self._say(f"warning: checkpoint {step} cannot be read ({reason}); moved to {target}, "
                      f"going on from step {good}")
            if jax.process_index() == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self._folder / str(step), target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("broken checkpoints moved")
        self._manager = self._open()

    def wait(self) -> None:
        """Returns when everything started is on disk; UserError where the disk did not take it."""
        with run_disk(self._folder):
            self._manager.wait_until_finished()

    def close(self, seconds: float | None = None) -> None:
        """Waits, so many seconds at most, then releases the folder."""
        if seconds is None:
            with run_disk(self._folder):
                self._manager.close()
            return
        closing = threading.Thread(target=self._manager.close, daemon=True)
        closing.start()
        closing.join(seconds)


def newest_saved(workdir: str | Path) -> tuple[Any, int] | None:
    """(config, step) of the newest checkpoint of a run folder whose config can be read, or None."""
    folder = Path(workdir).resolve() / CHECKPOINTS
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    for step in sorted(steps, reverse=True):
        try:
            meta = ocp.JsonCheckpointHandler().restore(folder / str(step) / META,
                                                       args=ocp.args.JsonRestore())
            return config_from_json(meta["config"]), step
        except Exception:  # whatever a torn folder makes the reader raise; a restore says it
            continue
    return None


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_WRITING)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)))


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def write_run_files(workdir: Path, config: Any) -> None:
    """config.json and versions.json of a run folder, each written at once or not at all."""
    from apt_jax.config import save_json

    workdir.mkdir(parents=True, exist_ok=True)
    save_json(config, workdir / CONFIG_FILE)
    part = workdir / f".versions.json.{os.getpid()}.tmp"
    part.write_text(json.dumps(versions(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, workdir / "versions.json")


def versions() -> dict[str, Any]:
    """What a result depends on besides config and data: packages, Python, devices."""
    import platform

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = versions_of(names)
    from apt_jax import __version__

    devices = jax.devices()
    return {"apt_jax": __version__, "python": platform.python_version(), "packages": found,
            "platform": devices[0].platform, "device": devices[0].device_kind,
            "devices": len(devices), "processes": jax.process_count()}
