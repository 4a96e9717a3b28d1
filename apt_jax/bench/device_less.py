"""Compile attention for hardware that is not there, and check what came out.

A program passes when the kernel that was named is in it as often as it must be and it makes no table
of scores (`bench/tables.py`). Whether it is fast is not known before it has run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from apt_jax.bench.cases import MARKERS, AttentionCase, parts_of_backend
from apt_jax.bench.tables import Pair, made, tables
from apt_jax.errors import UserError
from apt_jax.kernels.attention import attention
from apt_jax.kernels.choice import choosing
from apt_jax.plan.devices import elsewhere
from apt_jax.plan.hlo import parse_hlo


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled program shows.

    kernels: marker -> how often it runs in one call. wanted: the same, as it must be.
    largest: elements of the largest array that it makes. tables: those that look like scores.
    error: why there is no program, or what is wrong with it; "" where it passes.
    written_bytes: what neither products nor kernels write: norms, modulation, rotary positions,
      rounding, copies. Each byte is read again at least once.
    selected: the kernels that attention got (`kernels.dispatch.recording`).
    """

    case: str
    backend: str
    part: str
    device: str
    kernels: dict[str, int]
    wanted: dict[str, int]
    largest: int
    temporary_bytes: int
    seconds: float
    error: str
    written_bytes: int = 0
    selected: Sequence[str] = ()
    tables: Sequence[str] = ()

    @property
    def passes(self) -> bool:
        return not self.error


# Instructions that write nothing of their own, or whose work is counted elsewhere; so do those that
# start what another waits for, which has the result.
SILENT = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while",
          "call", "conditional", "custom-call", "partition-id", "replica-id", "async", "opt-barrier")


class Counted(NamedTuple):
    """kernels: marker -> runs in one call; largest: elements of the largest array that the program

    makes; result: elements of the largest result of a counted kernel; written: see
    `Compiled.written_bytes`; tables: see `tables.tables`."""

    kernels: dict[str, int]
    largest: int
    result: int
    written: int
    tables: Sequence[str] = ()


def count_kernels(text: str, markers: Sequence[str], others: Sequence[str] = (),
                  pairs: Sequence[Pair] = ()) -> Counted:
    """How often a call of the program runs custom calls that say each marker, and sizes.

    text: the compiled module; loops count as often as they turn. others: markers of calls whose
    results are not sized. pairs: queries and keys whose scores are looked for.
    """
    program = parse_hlo(text)
    counts, result, written = dict.fromkeys([*markers, *others], 0.0), 0, 0.0
    # what is inside a fusion stays in registers
    inside = {i.called["calls"] for body in program.computations.values() for i in body
              if i.opcode in ("fusion", "fusion-start") and "calls" in i.called}
    for name, times in program.walk():
        for instruction in program.computations[name]:
            silent = instruction.opcode.startswith(SILENT) or instruction.opcode.endswith("-start")
            if name not in inside and not silent:
                written += times * instruction.bytes
            if instruction.opcode.startswith("custom-call"):
                size = max((math.prod(array.shape) for array in instruction.result), default=0)
                line = f"{instruction.name} {instruction.rest}"
                for marker in counts:
                    if marker in line:
                        counts[marker] += times
                        result = max(result, 0 if marker in others else size)
    largest = max((math.prod(array.shape) for _, array in made(program)), default=0)
    return Counted({marker: round(n) for marker, n in counts.items()}, largest, result,
                   round(written), tables(program, pairs))


def compile_attention(case: AttentionCase, backend: str, part: str, device: Any) -> Compiled:
    """part: "forward" or "gradient" (with respect to q, k and v)."""
    def forward(q, k, v, mask=None):
        return attention(q, k, v, mask)

    def loss(q, k, v, mask=None):
        return attention(q, k, v, mask).astype(jnp.float32).sum()

    function = forward if part == "forward" else jax.grad(loss, (0, 1, 2))
    index = ("forward", "gradient").index(part)
    markers = MARKERS.get(backend, {})
    wanted = {name: 0 if case.plain else counts[index] for name, counts in markers.items()}
    pairs = [] if case.plain else [(case.queries, case.keys)]
    said = {"case": case.name, "backend": backend, "part": part, "device": device.device_kind,
            "wanted": wanted}
    start = time.perf_counter()
    try:
        with elsewhere(device), choosing(backend=backend):
            compiled = jax.jit(function).lower(
                *case.abstract(SingleDeviceSharding(device))).compile()
    except UserError as error:
        reason = str(error)
    except Exception as error:  # whatever the compiler of that hardware says
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        found = count_kernels(compiled.as_text(), list(markers), pairs=pairs)
        return Compiled(kernels=found.kernels, largest=found.largest, tables=found.tables,
                        error=complaint(found.kernels, wanted, found.tables),
                        written_bytes=found.written,
                        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
                        seconds=time.perf_counter() - start, **said)
    return Compiled(kernels={}, largest=0, temporary_bytes=0, error=reason,
                    seconds=time.perf_counter() - start, **said)


def complaint(kernels: dict[str, int], wanted: dict[str, int], tables: Sequence[str]) -> str:
    """What is wrong with a program, "" where nothing is. tables: of scores, in it."""
    wrong = [f"{name} runs {kernels[name]} times, not {count}"
             for name, count in wanted.items() if kernels[name] != count]
    if tables:
        wrong.append(f"{tables[0]} is a table of scores"
                     + (f", and so are {len(tables) - 1} others" if len(tables) > 1 else ""))
    return "; ".join(wrong)


def compile_all(cases: Sequence[AttentionCase], backends: Sequence[str], device: Any,
                done: Callable[[Compiled], None] = lambda row: None) -> list[Compiled]:
    """Every case by every backend, forward and, where it has one, gradient; `done` is told of each
    as it ends."""
    rows = []
    for case in cases:
        for backend in backends:
            for part in parts_of_backend(backend):
                row = compile_attention(case, backend, part, device)
                rows.append(row)
                done(row)
    return rows


def table(rows: Sequence[Compiled]) -> str:
    """The rows as text."""
    width = max([18, *(len(r.case) for r in rows)]) + 2
    part = max([8, *(len(r.part) for r in rows)]) + 2
    head = (f"{'case':<{width}}{'backend':<10}{'part':<{part}}{'temp MiB':>10}{'written':>11}{'sec':>7}  "
            "kernels")
    lines = [head, "-" * len(head)]
    for r in rows:
        found = (", ".join(f"{n} x {name.strip(chr(34))}" for name, n in r.kernels.items() if n)
                 or "none (plain JAX)")
        lines.append(f"{r.case:<{width}}{r.backend:<10}{r.part:<{part}}{r.temporary_bytes / 2**20:>10.1f}"
                     f"{r.written_bytes / 2**20:>11.1f}{r.seconds:>7.1f}  "
                     f"{'FAILS: ' + r.error if r.error else found}")
    return "\n".join(lines)
