"""What weights files and checkpoints have in common: names, cards, checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.errors import UserError

BUNDLED = "bundled:"
WEIGHTS_FILE, CONFIG_FILE, CHECKPOINTS = "model.safetensors", "config.json", "checkpoints"
INDEX_FILE = "model.safetensors.index.json"
KIND, PIPELINE, TRANSFORMER = "generator", "pipeline", "transformer"


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, keys sorted."""
    flat: dict[str, Any] = {}
    for key in sorted(params):
        value = params[key]
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    params: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split("/")
        node = params
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return params


class Leaves:
    """Flat parameters in memory, to be read like those of a file."""

    def __init__(self, flat: Mapping[str, Any]):
        self._flat = flat

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._flat.items()}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        return np.asarray(self._flat[name] if layer is None else self._flat[name][layer])


def is_run(folder: Path) -> bool:
    """Whether a folder is one that train wrote."""
    return not has_weights(folder) and (folder / CHECKPOINTS).is_dir()


def has_weights(folder: Any) -> bool:
    """Whether a folder holds our safetensors itself."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def read_card(folder: Any) -> dict[str, Any]:
    """config.json of a folder (or of a package's); UserError when it is missing or no table."""
    try:
        card = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder} has no readable {CONFIG_FILE}; copy it from where the weights "
                        "came from") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is not valid JSON ({error}); copy it "
                        "again") from None
    if not isinstance(card, dict):
        raise UserError(f"{folder / CONFIG_FILE} holds no table but {type(card).__name__}; copy it "
                        "again")
    return card


def make_abstract(model: Any) -> Any:
    """Shapes and dtypes of a generator's parameters."""
    from apt_jax.models.presets import make_generator

    return make_generator(model).abstract()


def check_keys(have: Mapping[str, tuple[int, ...]], abstract: Any, source: str) -> None:
    """Missing, unknown and misshapen parameters, by name. have: {"a/b": shape}."""
    want = {k: tuple(v.shape) for k, v in flatten(abstract).items()}
    for problem, names in (("lacks", sorted(set(want) - set(have))),
                           ("has the unknown", sorted(set(have) - set(want)))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source} {problem} parameter {names[0]!r}{more} for its own "
                            f"{CONFIG_FILE}; export it again")
    for name in want:
        if want[name] != have[name]:
            raise UserError(f"{source}: parameter {name!r} is {have[name]}, its {CONFIG_FILE} "
                            f"says {want[name]}; export it again")


def plain(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a config as JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in dict(section).items()}
