"""Config files and dotted overrides, with ml_collections' syntax and one-line errors.

`config_flags` itself needs parsed absl flags, which notebooks and tests do not have, so the
same syntax is read here: FILE.py or FILE.py:ARGUMENT, and --config.a.b=value or --config.a.b value.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from apt_jax.config.schema import BY_KEY
from apt_jax.errors import UserError

PREFIX = "--config."


def nearest(name: str, names: Iterable[str]) -> str:
    """The closest of `names` as ", did you mean 'X'?"; '' only if there are no names.

    Whole dotted names come first, then their last parts (a right field in the wrong group, or
    without its group), then initials ('lr' for learning_rate), then whatever is least far.
    """
    names = list(names)
    if not names:
        return ""
    leaf = name.rsplit(".", 1)[-1]
    leaves: dict[str, str] = {}
    initials: dict[str, str] = {}
    for right in names:
        last = right.rsplit(".", 1)[-1]
        leaves.setdefault(last, right)
        initials.setdefault("".join(word[:1] for word in last.split("_")), right)
    whole = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    last = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    if whole:
        right = whole[0]
    elif last:
        right = leaves[last[0]]
    elif len(leaf) > 1 and leaf in initials:
        right = initials[leaf]
    else:
        right = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return f", did you mean {right!r}?"


def flat_keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Dotted keys of all leaves, in order of insertion."""
    keys = []
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            keys.extend(flat_keys(value, f"{prefix}{key}."))
        else:
            keys.append(prefix + key)
    return keys


def get_key(config: ml_collections.ConfigDict, key: str) -> Any:
    """The value at a dotted key that exists."""
    for part in key.split("."):
        config = config[part]
    return config


def set_key(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets the value at a dotted key that exists."""
    *groups, leaf = key.split(".")
    for part in groups:
        config = config[part]
    config[leaf] = value


# -- values ----------------------------------------------------------------------------------------


def kind_of(key: str, current: Any) -> str:
    """Words for the type a key takes: 'a whole number', 'text', ..."""
    if isinstance(current, tuple):
        return {int: "whole numbers such as 4,9", float: "numbers such as 0.5,1.0",
                str: "words such as 'red heart,cat face'"}[_item_of(key, current)]
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[
        type(current)]


def _item_of(key: str, current: tuple) -> type:
    """int, float or str: what the elements of a tuple field are; an empty default holds ints."""
    sample = current or (BY_KEY[key].default if key in BY_KEY else ())
    return type(sample[0]) if sample else int


def _number(text: str, kind: type) -> int | float:
    value = kind(text.strip())
    if kind is float and value != value:
        raise ValueError("not a number")
    return value


def parse_value(key: str, text: str, current: Any) -> Any:
    """`text` as the type of `current`. An int fits a float field, never a float an int field."""
    try:
        if isinstance(current, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False,
                    "no": False}[text.strip().lower()]
        if isinstance(current, int):
            return _number(text, int)
        if isinstance(current, float):
            return _number(text, float)
        if isinstance(current, tuple):
            return _parse_tuple(text, _item_of(key, current))
        return text
    except (ValueError, KeyError, SyntaxError):
        raise UserError(
            f"--config.{key}={text}: {key} takes {kind_of(key, current)}, "
            f"not {text!r}; its value is {current!r}"
        ) from None


def _parse_tuple(text: str, item: type) -> tuple:
    """'4,9', '(4, 9)', '4,', '()' and '' for numbers; words split at commas or Python syntax."""
    text = text.strip()
    if text.startswith(("(", "[")):
        value = ast.literal_eval(text)
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if item is float:
            value = tuple(float(v) if type(v) is int else v for v in value)
        if any(type(v) is not item for v in value):
            raise ValueError("wrong element type")
        return value
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "":  # a trailing comma, or nothing at all
        parts.pop()
    if any(part == "" for part in parts):
        raise ValueError("an empty element")
    if item is str:
        return tuple(parts)
    return tuple(_number(part, item) for part in parts)


# -- overrides -------------------------------------------------------------------------------------


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts a command line into (overrides as '--config.key=value', everything else), in order.

    '--config.key value' takes the next argument as its value. Only arguments that begin with
    '--config.' are overrides; '--config FILE' is left alone.
    """
    overrides, rest = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith(PREFIX):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        elif pending and not pending[0].startswith("--"):
            overrides.append(f"{argument}={pending.pop(0)}")
        else:
            raise UserError(f"{argument} has no value; write {argument}=VALUE")
    return overrides, rest


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Applies '--config.a.b=value' (or 'a.b=value') in place, keeping each field's type.

    UserError, in one line, for a key that does not exist (names the nearest), for a group in place
    of a field and for a value of the wrong type.
    """
    # '--config.key value' written as two arguments is accepted here too (notebooks, API calls)
    joined, rest = split_overrides(overrides)
    for text in joined + rest:
        key, equals, value = text.partition("=")
        key = key.removeprefix(PREFIX)
        if not equals:
            raise UserError(f"{text!r} is not an override; write --config.key=value")
        keys = flat_keys(config)
        if key not in keys:
            inside = [k for k in keys if k.startswith(key + ".")]
            if inside:
                raise UserError(f"--config.{key} is a group, not a field; set one of its fields: "
                                f"{', '.join(inside)}")
            raise UserError(f"unknown config key {key!r}{nearest(key, keys)}")
        set_key(config, key, parse_value(key, value, get_key(config, key)))


# -- files -----------------------------------------------------------------------------------------


def _where(error: BaseException, path: Path) -> str:
    """'FILE line N' of the innermost frame that lies in the config file itself."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path} line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path} line {lines[-1]}" if lines else str(path)


def _problem(error: BaseException, keys: Sequence[str]) -> str:
    """One line for what a config file raised, naming the right key where a name was wrong."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, (KeyError, AttributeError)) and "ml_collections" in last:
        name = re.search(r"[\"']([A-Za-z_]\w*)[\"'\\]", str(error))
        if name:
            return f"unknown config key {name[1]!r}{nearest(name[1], keys)}"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def split_argument(path: str) -> tuple[Path, str | None]:
    """'FILE.py:ARGUMENT' -> (FILE.py, ARGUMENT); 'FILE.py' -> (FILE.py, None)."""
    head, colon, argument = path.rpartition(":")
    if colon and head.endswith(".py"):
        return Path(head), argument
    return Path(path), None


def load_config(path: str | Path, overrides: Sequence[str] = (),
                keys: Sequence[str] | None = None) -> ml_collections.ConfigDict:
    """Runs a config file's `get_config()` and applies overrides: a locked ConfigDict, unchecked.

    path: 'FILE.py', or 'FILE.py:ARGUMENT' for a get_config(argument). The file is run as Python.
    overrides: '--config.key=value' strings, or pairs '--config.key', 'value'.
    keys: the names to choose the nearest from, where a name is wrong (a training config's).
    Call `validate` on the result. UserError in one line for a missing file, one without
    get_config, one that raises or exits, and for every wrong override.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides = {overrides!r} is one text; give a list of them")
    file, argument = split_argument(str(path))
    keys = list(BY_KEY if keys is None else keys)
    if file.is_dir():
        inside = [str(file / p.name) for p in sorted(file.glob("*.py"))]
        hint = f"such as {inside[0]}" if inside else "FILE.py; there is none in it"
        raise UserError(f"the config {str(file)!r} is a folder; give one of its files, {hint}")
    if not file.is_file():
        beside = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise UserError(f"config file {str(file)!r} does not exist{nearest(str(file), beside)}")
    scope: dict[str, Any] = {"__name__": f"apt_jax_config_{file.stem}", "__file__": str(file)}
    folder = str(file.parent.resolve())  # so that a config can import what its family shares
    sys.path.insert(0, folder)
    before = set(sys.modules)
    try:
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), scope)
        get_config = scope.get("get_config")
        if not callable(get_config):
            raise UserError(f"{file} has no get_config(); define get_config() that returns "
                            "apt_jax.config.base_config() with your changes")
        takes = bool(inspect.signature(get_config).parameters)
        if argument is not None and not takes:
            raise UserError(f"{file}: its get_config() takes no argument, so ':{argument}' cannot "
                            "be passed; drop it")
        config = get_config(argument) if argument is not None else get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code: all of it becomes one line
        raise UserError(f"{_where(error, file)}: {_problem(error, keys)}") from None
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:  # another folder may have a file of the same name
            if str(getattr(sys.modules[name], "__file__", "")).startswith(folder + os.sep):
                del sys.modules[name]
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{file}: get_config() returned a {type(config).__name__}; it must return "
                        "an ml_collections ConfigDict")
    config = config.copy_and_resolve_references().lock()
    apply_overrides(config, overrides)
    return config
