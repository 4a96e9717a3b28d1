"""Why a file is left out: damaged for good, or not to be read just now and tried again."""

from __future__ import annotations

import dataclasses
import re

from apt_jax.errors import passes


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file that is left out, and why; passing: the next run tries it again."""

    name: str
    reason: str
    passing: bool = False

    def to_json(self) -> dict:
        """Its entry in the lists of what was left out."""
        value = {"name": self.name, "reason": self.reason}
        return value | {"passing": True} if self.passing else value


def skipped(name: str, error: Exception) -> Skipped:
    """The entry of a file whose reading ended with this error.

    The reason names neither paths nor addresses: equal faults have equal reasons, on every run.
    """
    kind = type(error).__name__
    if kind == "UnidentifiedImageError":  # Pillow's words are those of the file object
        words = "no picture of a known format"
    else:
        words = getattr(error, "strerror", None) or str(error)
    words = re.sub(r" object at 0x[0-9a-f]+", "", words)
    return Skipped(name, " ".join(f"{kind}: {words}".split())[:200], passes(error))
