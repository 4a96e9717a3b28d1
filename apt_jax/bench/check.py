"""Whether a kernel that is timed computes attention: a few queries, held to plain JAX in float32.

The queries lie spread over the sequence, the first and the last among them, so that whole tiles, the
last one and every part of a ring have some. A gradient is held to the oracle's from a cotangent that
is random at those queries and zero at all others: then they alone make it, and the oracle needs their
rows of the score table only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.kernels.oracle import oracle

CHECKED = 64  # queries whose scores fit beside everything else
# Distances, norm over norm, that rounding alone does not make. Seen in interpret mode and on CPUs:
# bfloat16 2.4e-3, float32 6e-7 (tensor cores that round its factors: some 3e-4), eight bits 0.06.
HALF, SINGLE, EIGHT = 1e-2, 2e-3, 0.1


def limit(backend: str, dtype: str) -> float:
    """The largest distance from float32 that a row may have."""
    if backend == "cudnn_fp8":
        return EIGHT
    return SINGLE if dtype == "float32" else HALF


def probes(queries: int) -> np.ndarray:
    """Which queries are looked at: CHECKED at most, the first and the last among them."""
    return np.unique(np.linspace(0, queries - 1, min(CHECKED, queries)).round().astype(int))


def _apart(found: jax.Array, want: jax.Array) -> jax.Array:
    found = found.astype(jnp.float32)
    return jnp.linalg.norm(found - want) / jnp.maximum(jnp.linalg.norm(want), 1e-30)


def _singles(*arrays: jax.Array) -> list[jax.Array]:
    return [x.astype(jnp.float32) for x in arrays]


@jax.jit
def _forward(out, q, k, v, *mask):
    at = probes(q.shape[1])
    with jax.default_matmul_precision("highest"):
        return _apart(out[:, at], oracle(*_singles(q[:, at], k, v), *mask))


@jax.jit
def _only_probes(dout):
    at = probes(dout.shape[1])
    return jnp.zeros_like(dout).at[:, at].set(dout[:, at])


@jax.jit
def _gradient(found, q, k, v, dout, *mask):
    at = probes(q.shape[1])
    with jax.default_matmul_precision("highest"):
        _, pull = jax.vjp(lambda *a: oracle(*a, *mask), *_singles(q[:, at], k, v))
        dq, dk, dv = pull(dout[:, at].astype(jnp.float32))
    dq = jnp.zeros(q.shape, jnp.float32).at[:, at].set(dq)
    return [_apart(*pair) for pair in zip(found, (dq, dk, dv), strict=True)]


def distances(call: Callable[..., Any], part: str, inputs: Sequence[jax.Array]) -> dict[str, float]:
    """{"out": distance} of a forward pass, {"dq", "dk", "dv"} of a gradient.

    inputs: q, k, v, a gradient's cotangent, the mask where there is one: as call takes them.
    """
    if part == "forward":
        return {"out": float(_forward(call(*inputs), *inputs))}
    q, k, v, dout, *mask = inputs
    dout = _only_probes(dout)
    found = _gradient(call(q, k, v, dout, *mask), q, k, v, dout, *mask)
    return dict(zip(("dq", "dk", "dv"), map(float, found), strict=True))


def wrong(found: dict[str, float], most: float) -> str:
    """What is wrong with these distances, "" where nothing is."""
    far = {name: d for name, d in found.items() if not (math.isfinite(d) and d <= most)}
    return (", ".join(f"{name} is {d:.1e} from float32" for name, d in far.items())
            + f", which may be {most:g}") if far else ""
