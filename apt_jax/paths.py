"""Paths as users give them."""

from __future__ import annotations

import os
from typing import Any

from apt_jax.errors import UserError


def given_path(name: str, value: Any) -> str:
    """A path argument as a string, a leading ~ as the home folder it stands for.

    A shell does the latter for a word of its own, not within --out=~/x, and Python never does.
    Raises UserError for what is no path. name: of the argument.
    """
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise UserError(f"{name} = {value!r:.60} is no path; give a string or a pathlib.Path")
    if not path.strip():  # "" would be the folder one is in
        raise UserError(f"{name} = {path!r} names nothing; give a path")
    return os.path.expanduser(path)
