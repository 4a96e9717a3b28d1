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


def memory(compiled: Any, before: Mapping[str, int]) -> dict[str, Any]:
    """Bytes of one device: what the program asks for, the most that it had in use, and the first over
    the second.

    before: `memory_stats` before anything of this case was made. A device reports the peak of the
    whole process: where this case did not raise it, its own is not known (None). What was in use
    before is not the case's.
    """
    found = compiled.memory_analysis()
    planned = (found.argument_size_in_bytes + found.output_size_in_bytes
               + found.temp_size_in_bytes - found.alias_size_in_bytes) if found else None
    peak = memory_stats().get("peak_bytes_in_use")
    rose = peak is not None and peak > before.get("peak_bytes_in_use", 0)
    own = peak - before.get("bytes_in_use", 0) if rose else None
    return {"planned_bytes": planned, "peak_bytes": own,
            "planned_over_peak": planned / own if planned and own else None}
