"""What a device says of its memory, and what a compiled program asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax


def memory_stats() -> dict[str, int]:
    """What the first device says of its memory; {} where it says nothing (CPUs)."""
    return jax.local_devices()[0].memory_stats() or {}


def device_memory() -> int:
    """Bytes that a program here may use: the first device's limit, a CPU's physical memory."""
    return memory_stats().get("bytes_limit") or (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def planned(compiled: Any) -> int | None:
    """Bytes of one device that a program asks for; None where the compiler does not say."""
    found = compiled.memory_analysis()
    return (found.argument_size_in_bytes + found.output_size_in_bytes
            + found.temp_size_in_bytes - found.alias_size_in_bytes) if found else None


def peak(asked: int | None, before: Mapping[str, int]) -> dict[str, Any]:
    """Bytes of one device: what the program asks for (`planned`), the most that it had in use, and the
    first over the second.

    before: `memory_stats` before anything of this case was made. A device reports the peak of the
    whole process: where this case did not raise it, its own is not known (None). What was in use
    before is not the case's.
    """
    most = memory_stats().get("peak_bytes_in_use")
    rose = most is not None and most > before.get("peak_bytes_in_use", 0)
    own = most - before.get("bytes_in_use", 0) if rose else None
    return {"planned_bytes": asked, "peak_bytes": own,
            "planned_over_peak": asked / own if asked and own else None}
