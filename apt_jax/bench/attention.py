"""Attention on the hardware that is here: every backend that can, and its peers, side by side."""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.bench import attention_peers as peers
from apt_jax.bench import check
from apt_jax.bench.cases import AttentionCase, parts_of_backend
from apt_jax.bench.memory import device_memory
from apt_jax.bench.profile import folder_of, profiled
from apt_jax.bench.report import Results, attempt
from apt_jax.bench.rows import keep, make_rows
from apt_jax.bench.timing import measure
from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.kernels.attention import attention
from apt_jax.kernels.choice import BACKENDS, Hardware, choosing

# The makers' dense bfloat16 peaks, FLOP/s, by what a device calls itself.
PEAKS = {"H100": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
         "H200 NVL": 835e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
         "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
         "TPU v6e": 918e12}
PEERS = ("torch", "tokamax_choice")


def peak_of(device: str) -> float | None:
    """The peak of the longest name that is in the device's: a "TPU v5 lite" is no "TPU v5"."""
    names = sorted((name for name in PEAKS if name in device), key=len)
    return PEAKS[names[-1]] if names and "MIG" not in device else None  # a part of a device


def ours(backend: str, part: str, hidden_last: bool = False) -> Callable[..., Any]:
    """One backend as a jitted function of `peers.inputs_of`'s arrays; UserError where it cannot
    serve. hidden_last: see `kernels.attention.attention`."""
    def forward(q, k, v, *mask):
        with choosing(backend=backend):
            return attention(q, k, v, *mask, hidden_last=hidden_last)

    return jax.jit(forward if part == "forward" else peers.gradient_of(forward))


def check_oracle(case: AttentionCase, part: str, memory: int | None = None) -> None:
    """UserError where plain attention's scores are more than the device's memory (bytes).

    At least float32 scores and their weights in case.dtype lie there at once; three tables where
    they are differentiated.
    """
    memory = memory or device_memory()
    scores = case.batch * case.heads * case.queries * case.keys
    needed = scores * (4 + jnp.dtype(case.dtype).itemsize if part == "forward" else 12)
    if needed > memory:
        raise UserError(f"its scores take {needed / 2**30:.0f} GiB, and the device has "
                        f"{memory / 2**30:.0f}")


def contender(case: AttentionCase, part: str, backend: str, seeds: Sequence[int],
              inputs: Callable[[], Sequence[tuple]]) -> peers.Contender:
    """A backend or a peer; UserError where it cannot serve."""
    if backend == "torch":
        return peers.torch_sdpa(case, part, seeds)
    if backend == "tokamax_choice":
        return peers.tokamax_choice(part, inputs())
    if case.plain and backend != "oracle":
        raise UserError("few queries: every backend takes plain JAX")
    reason = dispatch.refusal(backend, dispatch.Request.of(*case.abstract()[:3]))
    if reason:
        raise UserError(reason)
    if backend in dispatch.PLAIN:
        check_oracle(case, part)
    return peers.Contender(ours(backend, part), peers.inputs_of(part, inputs()),
                           jax.block_until_ready)


def run(cases: Sequence[AttentionCase], backends: Sequence[str], results: Results, *,
        seconds: float = 2.0, seeds: Sequence[int] = (0, 1, 2), profile: str = "",
        tell: Callable[[str], None] = print) -> int:
    """Times every case by every backend and adds a row for each; rows that are there are kept.
    profile: a folder for traces. Returns how many rows failed; raises `rows.DeviceLost`."""
    device = Hardware.of(jax.devices()[0])

    def made(case, part, backend, inputs):
        name = f"{case.name}/{part}/{backend}"
        row = {**dataclasses.asdict(case), "backend": backend, "part": part}
        row |= attempt(lambda: _timed(case, part, backend, seeds, inputs, device, seconds,
                                      folder_of(profile, name), dict(row)))
        forward = f"{case.name}/forward/{backend}"
        if part == "gradient" and "median" in row and forward in results:
            row |= backward(case, row, results.rows[forward], device)
        return row

    def todo():
        for case in cases:
            inputs = functools.cache(  # drawn on the device once, for all backends
                lambda case=case: [tuple(case.arrays(seed)) for seed in seeds])
            for part in ("forward", "gradient"):
                for backend in backends:
                    if part in parts_of_backend(backend):
                        yield (f"{case.name}/{part}/{backend}", "",
                               functools.partial(made, case, part, backend, inputs))

    return make_rows(todo(), results, lambda name, row: tell(line(name, row)))


def _timed(case: AttentionCase, part: str, backend: str, seeds: Sequence[int],
           inputs: Callable[[], Sequence[tuple]], device: Hardware, seconds: float,
           trace: Path | None, head: dict[str, Any]) -> dict[str, Any]:
    call, sets, wait, says = contender(case, part, backend, seeds, inputs)
    row = dict(says)
    try:
        if backend != "torch":  # before it is timed: the time of a wrong result says nothing
            found = check.distances(call, part, sets[0])
            row["distances"] = found
            if error := check.wrong(found, check.limit(backend, case.dtype)):
                return row | {"error": error}
        timing = measure(call, sets, wait, seconds=seconds)
        flops = case.flops["forward"] + (case.flops["backward"] if part == "gradient" else 0)
        peak = peak_of(device.name)
        row |= {**dataclasses.asdict(timing), "tflops": flops / timing.median / 1e12,
                "share_of_peak": flops / timing.median / peak if peak else None}
        keep(head | row)
        return row | (profiled(call, sets, wait, trace) if backend != "torch" else {})
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold what PyTorch shall give back
        raise
    finally:
        if backend == "torch":
            call = sets = None
            peers.release_torch()


def backward(case: AttentionCase, gradient: dict[str, Any], forward: dict[str, Any],
             device: Hardware) -> dict[str, Any]:
    """What the backward pass alone reaches: a gradient's row less its forward pass's; {} where that
    was not timed, or takes as long."""
    seconds = gradient["median"] - forward.get("median", float("inf"))
    if seconds <= 0:
        return {}
    rate, peak = case.flops["backward"] / seconds, peak_of(device.name)
    return {"backward_seconds": seconds, "backward_tflops": rate / 1e12,
            "backward_share_of_peak": rate / peak if peak else None}


def line(name: str, row: dict[str, Any]) -> str:
    """One row as text."""
    for key, words in (("skipped", "left out"), ("error", "FAILED")):
        if key in row:
            return f"{name:<40} {words}: {row[key]}"
    share = f"{row['share_of_peak']:>6.0%} of peak" if row["share_of_peak"] else ""
    alone = row.get("backward_tflops")
    return (f"{name:<40}{1e3 * row['median']:>10.3f} ms  {row['tflops']:>8.2f} TFLOP/s{share}"
            f"  (quartiles {1e3 * row['low']:.3f} to {1e3 * row['high']:.3f})"
            + (f"  backward alone {alone:.2f} TFLOP/s" if alone else "")
            + (f"  by {', '.join(row['kernels'])}" if "kernels" in row else "")
            + (f", {row['mask']}" if "mask" in row else "")
            + (f"  {max(row['distances'].values()):.1e} from float32" if "distances" in row else "")
            + (f"  (incomplete: {row['incomplete']})" if row.get("incomplete") else ""))


def default_backends() -> list[str]:
    """Every name but "auto", and the peers'."""
    return [name for name in BACKENDS if name != "auto"] + list(PEERS)
