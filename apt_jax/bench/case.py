"""One program to measure: compiled for hardware that is not there and checked, or timed on this one."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.bench.arrays import random_like
from apt_jax.bench.attention import peak_of
from apt_jax.bench.device_less import Compiled, complaint, count_kernels
from apt_jax.bench.memory import memory_stats, peak, planned
from apt_jax.bench.profile import CALLS, profiled
from apt_jax.bench.report import in_a_line
from apt_jax.bench.rows import keep
from apt_jax.bench.tables import Pair
from apt_jax.bench.timing import measure
from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.plan.devices import elsewhere

FP8 = "__cublas$lt$matmul$f8"  # how a compiled program for NVIDIA's GPUs names its eight-bit products
SETS = 3  # of inputs, which calls take in turns
LONG = 0.5  # seconds of a call of which one is traced


@dataclasses.dataclass(frozen=True)
class Case:
    """A program and what must be in it.

    Attributes:
      name: of its row. part: what it computes. backend: who computes attention.
      function, args: a jitted function and its abstract arguments, with shardings.
      flops: model FLOPs of one call over all devices; None where they are not counted.
      kernels: marker -> how often a call runs it (`device_less.count_kernels`).
      fp8: eight-bit products that a call runs at least; None where there must be none. exactly: no
        more than that.
      pairs: queries and keys of its attentions, whose scores must not lie in memory (`tables`).
      share: elements of one kernel's result that a device should make at most; None does not look.
      samples: of one call.
      donates: the first argument is a state, which comes out first and goes in again.
      weights: how many of the first arguments are not inputs: parameters, states.
      config: digest of the config behind it (`report.config_digest`).
    """

    name: str
    part: str
    backend: str
    function: Any
    args: tuple
    flops: Callable[[], float] | None = None
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fp8: int | None = None
    pairs: Sequence[Pair] = ()
    share: int | None = None
    samples: int = 1
    donates: bool = False
    weights: int = 1
    config: str = ""
    exactly: bool = False


def compile_case(case: Case, device: Any, label: str) -> Compiled:
    """Compiles a case for a device that is not there and checks what came out. A kernel that is
    absent or cannot serve is an error of the row, as whatever else the compiler says."""
    start = time.perf_counter()
    made = {"case": f"{case.name} ({label})", "backend": case.backend, "part": case.part,
            "device": device.device_kind}
    try:
        with elsewhere(device), dispatch.recording() as selected:
            compiled = case.function.lower(*case.args).compile()
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else in_a_line(error)
        return Compiled(**made, kernels={}, wanted=dict(case.kernels), largest=0, temporary_bytes=0,
                        seconds=time.perf_counter() - start, error=reason)
    found, largest, result, written, tables = count_kernels(
        compiled.as_text(), list(case.kernels), [FP8], case.pairs)
    eight = found.pop(FP8)
    wanted = dict(case.kernels)
    if device.platform == "gpu":
        least = case.fp8 or 0
        found[FP8] = eight
        wanted[FP8] = max(eight, least) if case.fp8 and not case.exactly else least
    error = complaint(found, wanted, tables)
    if not error and case.share is not None and result > 1.1 * case.share:
        error = f"a kernel makes {result} elements on one device, whose share is {case.share}"
    return Compiled(
        **made, kernels=found, wanted=wanted, largest=largest, error=error, written_bytes=written,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        seconds=time.perf_counter() - start, selected=sorted(selected), tables=tables)


def time_case(case: Case, device: str, seconds: float, trace: Path | None = None) -> dict[str, Any]:
    """Compiles a case for this machine and times it on SETS of random inputs; a row.

    selected: the kernels that attention got. planned_bytes: what the compiler asks for; peak_bytes:
    see `memory.peak`. finite, output_norm: of what came out for the first inputs, which are the same
    for every kernel. trace: a folder for a profile, for "device_seconds" and "costliest" (`profiled`).
    """
    # What can fail without having run comes first, and no time of a device is lost with it; first of
    # all what a kernel refuses.
    with dispatch.recording() as selected:
        lowered = case.function.lower(*case.args)
    flops = case.flops() if case.flops else None
    before = memory_stats()
    compiled = lowered.compile()
    asked = planned(compiled)
    fixed = random_like(case.args[:case.weights])
    inputs = [random_like(case.args[case.weights:], seed) for seed in range(SETS)]
    devices = {d for leaf in jax.tree.leaves(fixed) for d in leaf.sharding.device_set}
    # A CPU's virtual devices share its threads: with two calls under way some of them may wait in
    # a collective of the first and some in one of the second, for ever.
    apart = len(devices) > 1 and jax.default_backend() == "cpu"
    if case.donates:
        (state, *others), held = fixed, []
        held.append(state)
        del state, fixed  # its buffers are gone after the first call

        def call(*rest):
            held[0], out = compiled(held[0], *others, *rest)
            return out

        def wait(out):
            return jax.block_until_ready((out, held[0]))
    else:
        def call(*rest):
            return compiled(*fixed, *rest)

        wait = jax.block_until_ready
    first = looked_at(call(*inputs[0]))  # of a state that is updated: by the first update
    timing = measure(call, inputs, wait, seconds=seconds, apart=apart)
    row = {**dataclasses.asdict(timing), "backend": case.backend, "selected": sorted(selected),
           "samples_per_call": case.samples, **first,
           **rates(flops, timing.median, device, len(devices)), **peak(asked, before)}
    keep(row)
    return row | profiled(call, inputs, wait, trace,
                          calls=1 if apart or timing.median > LONG else CALLS)


def looked_at(result: Any) -> dict[str, Any]:
    """{"finite": whether a result has neither NaN nor infinity, "output_norm": its norm}: a time of
    something else than the result says nothing, and kernels that agree give the same norm."""
    finite, square = jax.device_get(_look(jax.tree.leaves(result)))
    norm = math.sqrt(square) if square >= 0 else math.nan
    return {"finite": bool(finite), "output_norm": norm if math.isfinite(norm) else None}


@jax.jit
def _look(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    single = [leaf.astype(jnp.float32) for leaf in leaves]
    return (jnp.stack([jnp.isfinite(leaf).all() for leaf in single]).all(),
            sum(jnp.sum(jnp.square(leaf)) for leaf in single))


def rates(flops: float | None, seconds: float, device: str, devices: int = 1) -> dict[str, Any]:
    """TFLOP/s of model FLOPs over all devices, and their share of the devices' dense bfloat16 peak."""
    peak = peak_of(device)
    if flops is None:
        return {"tflop": None, "tflops": None, "share_of_peak": None}
    return {"tflop": flops / 1e12, "tflops": flops / seconds / 1e12,
            "share_of_peak": flops / seconds / (devices * peak) if peak else None}


def line(name: str, row: Mapping[str, Any]) -> str:
    """A timed row as text."""
    if "skipped" in row:
        return f"{name:<52} left out: {row['skipped']}"
    if "error" in row:
        return f"{name:<52} FAILED: {row['error']}"
    rate = f"  {row['tflops']:8.2f} TFLOP/s" if row.get("tflops") else ""
    share = f" {row['share_of_peak']:.0%} of peak" if row.get("share_of_peak") else ""
    # of a peer, whose network may be larger than ours
    size = f"  {row['parameters'] / 1e9:.3g}B parameters" if row.get("parameters") else ""
    return (f"{name:<52}{1e3 * row['median']:>10.2f} ms{rate}{share}"
            f"  (quartiles {1e3 * row['low']:.2f} to {1e3 * row['high']:.2f})" + by(row) + size
            + held(row) + lacks(row))


def lacks(row: Mapping[str, Any]) -> str:
    """What is wrong with a row that has a time, as text."""
    wrong = "  NOT FINITE" if row.get("finite") is False else ""
    return wrong + (f"  (incomplete: {row['incomplete']})" if row.get("incomplete") else "")


def held(row: Mapping[str, Any]) -> str:
    """The memory that the compiler planned for beside the peak that the device saw, as text; "" where
    the device's is not known."""
    if not row.get("planned_over_peak"):
        return ""
    planned, peak = (row[key] / 2**30 for key in ("planned_bytes", "peak_bytes"))
    return (f"  planned {planned:.2f} GiB, {row['planned_over_peak']:.3f} of the peak of "
            f"{peak:.2f}")


def by(row: Mapping[str, Any]) -> str:
    """Which kernel "auto" was, as text."""
    return f"  by {', '.join(row['selected'])}" if row["backend"] == "auto" and row.get(
        "selected") else ""
