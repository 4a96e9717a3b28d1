"""Where a run's weights come from: its base, and the stages between."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from apt_jax.config import load_json
from apt_jax.weights import CHECKPOINTS, CONFIG_FILE, PIPELINE, TRANSFORMER, read_card

_DEPTH = 16  # stages that one may follow; a circle ends there


class History(NamedTuple):
    """stages: configs of the runs, the last first; base: the component folder they began with,
    None if that is not here."""

    stages: list[Any]
    base: Path | None


def component_folder(path: str | Path) -> Path | None:
    """The component folder that `path` is, or whose transformer it is; None otherwise."""
    if str(path).startswith("bundled:"):
        return None
    folder = Path(path)
    for candidate in (folder, folder.parent if folder.name == TRANSFORMER else folder):
        if (candidate / CONFIG_FILE).is_file() and not (candidate / CHECKPOINTS).is_dir():
            if read_card(candidate).get("kind") == PIPELINE:
                return candidate
    return None


def history(path: str | Path) -> History:
    """Follows init.generator and init.diffusion from a run (or any weights) to its base."""
    stages: list[Any] = []
    base: Path | None = None
    waiting, seen = [str(path)], set()
    while waiting and len(seen) < _DEPTH:
        name = waiting.pop(0)
        if not name or name in seen:
            continue
        seen.add(name)
        base = base or component_folder(name)
        folder = Path(name)
        if not name.startswith("bundled:") and (folder / CHECKPOINTS).is_dir():
            config = load_json(folder / CONFIG_FILE)
            stages.append(config)
            waiting += [config.init.generator, config.init.diffusion]
    return History(stages, base)
