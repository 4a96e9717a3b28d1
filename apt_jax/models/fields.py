"""The values of a component's config.json, checked by the defaults of its config class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from apt_jax.errors import UserError


def check_fields(what: str, fields: Mapping[str, Any], kind: type) -> None:
    """UserError for a value that is not like its field's default in the dataclass `kind`.

    Whole numbers are positive, other numbers finite, lists and tuples of what the default holds.
    what: begins the message, "a VAE's config".
    """
    for field in dataclasses.fields(kind):
        if field.name in fields and not _like(fields[field.name], field.default):
            raise UserError(f"{what} has {field.name} = {fields[field.name]!r}, which is not "
                            "allowed; import the checkpoint again")


def _like(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_like(v, default[0]) for v in value)
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    if type(default) is int:
        return type(value) is int and value > 0
    return type(value) is type(default)
