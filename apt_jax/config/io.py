"""A ConfigDict to JSON and back, exactly: tuples stay tuples, ints stay ints, floats bit by bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_collections

from apt_jax.errors import UserError

_TUPLE = "__tuple__"  # JSON has only lists; a tuple is written as {"__tuple__": [...]}


def _pack(value: Any) -> Any:
    if isinstance(value, (ml_collections.ConfigDict, dict)):
        return {str(k): _pack(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(v) for v in value]}
    if isinstance(value, list):
        return [_pack(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"a config field holds a {type(value).__name__}, which JSON cannot keep; use "
                    "numbers, strings, booleans and tuples of them")


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TUPLE}:
            return tuple(_unpack(v) for v in value[_TUPLE])
        return {k: _unpack(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    return value


def config_to_json(config: ml_collections.ConfigDict) -> str:
    """The config as indented JSON text with sorted keys: the same config, the same bytes."""
    return json.dumps(_pack(config), indent=2, sort_keys=True, allow_nan=False) + "\n"


def config_from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `config_to_json`: a locked ConfigDict. UserError if it is not such a text."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the config is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"the config must be a JSON object, not a {type(data).__name__}")
    try:
        return ml_collections.ConfigDict(_unpack(data), convert_dict=True).lock()
    except (ValueError, TypeError, RecursionError) as error:  # a dot in a key, no list in a tuple
        raise UserError(f"the config is damaged: {error}") from None


def save_json(config: ml_collections.ConfigDict, path: str | Path) -> None:
    """Writes the config to `path`; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text(config_to_json(config), encoding="utf-8")
    os.replace(part, path)


def load_json(path: str | Path) -> ml_collections.ConfigDict:
    """Reads what `save_json` wrote. UserError if the file is missing or damaged."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the config is not valid JSON: {error}") from None
    try:
        return config_from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
