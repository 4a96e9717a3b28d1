"""Where a run's weights come from: its base, and the stages between."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from apt_jax.config import load_kept
from apt_jax.errors import UserError
from apt_jax.weights import (
    CHECKPOINTS,
    CONFIG_FILE,
    PIPELINE,
    TRANSFORMER,
    init_path,
    read_card,
)
from apt_jax.weights.common import BUNDLED

_DEPTH = 16  # stages that one may follow; a circle ends there


class History(NamedTuple):
    """stages: configs of the runs, the last first; steps: of the newest checkpoint of each, None
    where there is none; base: the component folder they began with, None if that is not here;
    missing: what the runs name as their start and is not here; bundled: the weights of the package
    that they began with, "" for none."""

    stages: list[Any]
    steps: list[int | None]
    base: Path | None
    missing: list[str]
    bundled: str = ""


def component_folder(path: str | Path) -> Path | None:
    """The component folder that `path` is, or whose transformer it is; None otherwise."""
    if str(path).startswith(BUNDLED):
        return None
    folder = Path(path).expanduser()
    for candidate in (folder, folder.parent if folder.name == TRANSFORMER else folder):
        if (candidate / CONFIG_FILE).is_file() and not (candidate / CHECKPOINTS).is_dir():
            if read_card(candidate).get("kind") == PIPELINE:
                return candidate
    return None


def history(path: str | Path) -> History:
    """Follows init.generator and init.diffusion from a run (or any weights) to its base.

    Relative paths start from the directory that training recorded, where they are there.
    """
    stages: list[Any] = []
    steps: list[int | None] = []
    missing: list[str] = []
    base: Path | None = None
    bundled = ""
    waiting, seen = [str(path)], set()
    while waiting and len(seen) < _DEPTH:
        name = waiting.pop(0)
        if not name or name in seen:
            continue
        seen.add(name)
        if name.startswith(BUNDLED):
            bundled = bundled or name
            continue
        base = base or component_folder(name)
        folder = Path(name).expanduser()
        if not folder.exists() and name != str(path):
            missing.append(name)
        elif (folder / CHECKPOINTS).is_dir():
            config = load_kept(folder / CONFIG_FILE)
            stages.append(config)
            steps.append(max((int(p.name) for p in (folder / CHECKPOINTS).iterdir()
                              if p.name.isdigit()), default=None))
            waiting += [init_path(folder, config.init[key]) for key in ("generator", "diffusion")]
    return History(stages, steps, base, missing, bundled)


def check_found(past: History, checkpoint: str | Path, or_else: str = "") -> None:
    """UserError naming the first start that is not here, and how to mend it."""
    if past.missing:
        raise UserError(f"{checkpoint} began with {past.missing[0]}, which is not here; run the "
                        f"command in the folder where it was trained{or_else}")
