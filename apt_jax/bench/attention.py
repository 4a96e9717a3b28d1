"""Attention on the hardware that is here: every backend that can, and PyTorch's, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.bench.cases import AttentionCase, parts_of_backend
from apt_jax.bench.report import Results
from apt_jax.bench.timing import measure
from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.kernels.attention import attention
from apt_jax.kernels.choice import BACKENDS, Hardware, choosing
from apt_jax.kernels.oracle import oracle

# The makers' dense peaks, FLOP/s, for the share of it that a kernel reaches.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}


def peak_of(device: str) -> float | None:
    return next((rate for name, rate in PEAKS.items() if name in device), None)


def ours(case: AttentionCase, backend: str, part: str) -> Callable[..., Any]:
    """The compiled function of one backend; UserError where it cannot serve."""
    def forward(q, k, v, *mask):
        with choosing(backend=backend):
            return attention(q, k, v, *mask)

    def gradient(q, k, v, *mask):  # with the forward pass, which it needs
        loss = lambda *a: forward(*a, *mask).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return jax.jit(forward if part == "forward" else gradient)


CHECKED = 64  # queries whose scores fit beside everything else


def distance(call: Callable[..., Any], inputs: Sequence[jax.Array]) -> float:
    """How far the last queries' results are from plain attention in float32, over their norm."""
    @jax.jit
    def compare(out, q, k, v, *mask):
        with jax.default_matmul_precision("highest"):
            want = oracle(*(x.astype(jnp.float32) for x in (q[:, -CHECKED:], k, v)), *mask)
        return jnp.linalg.norm(out[:, -CHECKED:] - want) / jnp.linalg.norm(want)

    return float(compare(call(*inputs), *inputs))


def torch_sdpa(case: AttentionCase, part: str, seeds: Sequence[int]):
    """PyTorch's scaled_dot_product_attention on CUDA: (call, inputs, wait), or None without it."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    def tensors(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        make = lambda n: torch.randn(  # noqa: E731
            (case.batch, case.heads, n, case.head_dim), generator=generator, device="cuda",
            dtype=torch.bfloat16).requires_grad_(part == "gradient")
        mask = [] if case.hidden is None else [
            (torch.arange(case.keys, device="cuda") >= case.hidden)[None, None, None]]
        return make(case.queries), make(case.keys), make(case.keys), *mask

    def call(q, k, v, mask=None):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.autograd.grad(out.sum(), (q, k, v)) if part == "gradient" else out

    return call, [tensors(seed) for seed in seeds], lambda _: torch.cuda.synchronize()


def refused(case: AttentionCase, backend: str) -> str | None:
    """Why this backend is left out, None if it runs here."""
    request = dispatch.Request.of(*case.abstract()[:3])
    return "few queries: every backend takes plain JAX" if case.plain and backend != "oracle" else (
        dispatch.refusal(backend, request))


def run(cases: Sequence[AttentionCase], backends: Sequence[str], results: Results, *,
        seconds: float = 2.0, seeds: Sequence[int] = (0, 1, 2),
        tell: Callable[[str], None] = print) -> None:
    """Times every case by every backend and adds a row for each; rows that are there are kept."""
    device = Hardware.of(jax.devices()[0])
    for case in cases:
        for part in ("forward", "gradient"):
            for backend in backends:
                name = f"{case.name}/{part}/{backend}"
                if name in results or part not in parts_of_backend(backend):
                    continue
                row = _row(case, part, backend, device, seconds, seeds)
                results.add(name, row)
                tell(line(name, row))


def _row(case: AttentionCase, part: str, backend: str, device: Hardware, seconds: float,
         seeds: Sequence[int]) -> dict[str, Any]:
    row: dict[str, Any] = {**dataclasses.asdict(case), "backend": backend, "part": part}
    if backend == "torch":
        contender = torch_sdpa(case, part, seeds)
        if contender is None:
            return {**row, "skipped": "no PyTorch with CUDA"}
    else:
        reason = refused(case, backend)
        if reason:
            return {**row, "skipped": reason}
        contender = (ours(case, backend, part), [tuple(case.arrays(s)) for s in seeds],
                     jax.block_until_ready)
    try:
        timing = measure(*contender, seconds=seconds)
    except UserError:
        raise
    except Exception as error:  # out of memory for the oracle at 47k, an unsupported shape
        return {**row, "skipped": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    if part == "forward" and backend != "torch":
        row["distance"] = distance(contender[0], contender[1][0])
    flops = case.flops["forward"] + (case.flops["backward"] if part == "gradient" else 0)
    peak = peak_of(device.name)
    return {**row, **dataclasses.asdict(timing), "tflops": flops / timing.median / 1e12,
            "share_of_peak": flops / timing.median / peak if peak else None}


def line(name: str, row: dict[str, Any]) -> str:
    """One row as text."""
    if "skipped" in row:
        return f"{name:<40} left out: {row['skipped']}"
    share = f"{row['share_of_peak']:>6.0%} of peak" if row["share_of_peak"] else ""
    return (f"{name:<40}{1e3 * row['median']:>10.3f} ms  {row['tflops']:>8.2f} TFLOP/s{share}"
            f"  (quartiles {1e3 * row['low']:.3f} to {1e3 * row['high']:.3f})"
            + (f"  {row['distance']:.1e} from float32" if "distance" in row else ""))


def default_backends() -> list[str]:
    """Every name but "auto", and PyTorch's."""
    return [name for name in BACKENDS if name != "auto"] + ["torch"]
