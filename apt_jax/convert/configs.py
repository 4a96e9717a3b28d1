"""Reading another library's config.json: every field is taken, fixed, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from apt_jax.errors import UserError

LAYERS = 1000  # at most


def refuse(source: str, why: str) -> UserError:
    """The error for a model that cannot be converted."""
    return UserError(f"{source}: {why}; this model cannot be converted")


class Fields:
    """The fields of one config.json, each to be taken once; what is left over is refused.

    A field that is not understood may change what the network computes, so silence about it would
    give wrong pictures.
    """

    def __init__(self, config: Mapping[str, Any], source: str, *classes: str,
                 key: str = "_class_name"):
        found = config.get(key) if isinstance(config, Mapping) else None
        if not isinstance(found, str) or found not in classes:
            raise UserError(f"{source} describes {found or 'no model'}, not "
                            f"{' or '.join(classes)}; give the folder of that model")
        self._config = {k: v for k, v in config.items() if not k.startswith("_") and k != key}
        self._source, self._taken = source, set()

    def value(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        self._taken.add(key)
        value = self._config.get(key, default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{self._source}: {key} = {value!r} is not a valid value; copy the "
                            "file again")
        return value

    def integer(self, key: str, default: int, limit: int = 2**20) -> int:
        value = self.value(key, default, (int,))
        if value < 1:
            raise UserError(f"{self._source}: {key} = {value} must be 1 or more; copy the file "
                            "again")
        if value > limit:  # tables are written out layer by layer
            raise UserError(f"{self._source}: {key} = {value} is more than any model has; copy the "
                            "file again")
        return value

    def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        value = self.value(key, default, (list, tuple))
        if not all(type(v) in (int, float) and math.isfinite(v) for v in value):
            raise UserError(f"{self._source}: {key} = {value!r} are not finite numbers; copy the "
                            "file again")
        return tuple(float(v) for v in value)

    def number(self, key: str, default: float) -> float:
        return float(self.value(key, default, (int, float)))

    def integers(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        value = self.value(key, default, (list, tuple))
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise UserError(f"{self._source}: {key} = {value!r} are not integers; copy the file "
                            "again")
        return tuple(value)

    def finish(self, fixed: Mapping[str, Any], ignored: Sequence[str] = (),
               strict: bool = True) -> None:
        """Every other field must have its one supported value, or be known not to matter; an
        unknown one is refused where `strict`."""
        for key, value in self._config.items():
            if key in self._taken or key in ignored:
                continue
            if key not in fixed:
                if not strict or value is None or value is False:
                    continue  # a switch of a later release, off
                raise refuse(self._source, f"the field {key} = {value!r} is unknown")
            if (list(value) if isinstance(value, tuple) else value) != fixed[key]:
                raise refuse(self._source, f"{key} = {value!r} is not supported (only "
                                           f"{fixed[key]!r})")
