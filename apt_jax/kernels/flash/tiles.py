"""What the forward and the backward kernel share: tile sizes, padded loads, the mask as a bias.

Scores are kept in base 2 (exp2 is what the hardware has): s = (q . k) * scale * log2(e) + bias. A key
that nobody may look at has bias `MASKED`. The running maximum starts at `EMPTY`, far below any score
and far above `MASKED`, so that exp2(MASKED - maximum) is 0 without a select, also in a row without
a key: such a row comes out as zeros with log-sum-exp `EMPTY` and gets no gradient.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2E = math.log2(math.e)
MASKED = -1e30
EMPTY = -1e20
SMALLEST = 16  # the matrix units take no smaller tile


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens of a tile and how a program runs it. `stages` pipelines the loads of the loop."""

    q: int
    k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call.

    head_dim: the true one; `width` is the power of two that holds it.
    exact: float32 products at full precision; bfloat16 products always accumulate in float32.
    """

    head_dim: int
    forward: Tiles
    dkv: Tiles
    dq: Tiles
    exact: bool
    interpret: bool

    @property
    def width(self) -> int:
        return max(SMALLEST, pl.next_power_of_2(self.head_dim))

    @property
    def precision(self) -> jax.lax.Precision | None:
        return jax.lax.Precision.HIGHEST if self.exact else None


def plan(q: jax.Array, k: jax.Array, *, interpret: bool) -> Plan:
    """Tile sizes for H100 (228 KiB of shared memory and 64k registers a multiprocessor).

    Chosen by what compiles there without spilling registers, in float32 by what compiles within
    seconds: its products are unrolled into single multiplications, which spill from 128 channels on
    whatever the tiles. Not tuned on a GPU yet.
    """
    head_dim = q.shape[-1]
    width = max(SMALLEST, pl.next_power_of_2(head_dim))
    exact = q.dtype == jnp.float32
    if exact:  # four bytes an element, products outside the tensor cores
        warps = 4 if width <= 64 else 8  # the more there are, the fewer each unrolls
        sizes = {"forward": (64 if width <= 128 else 32, 32, warps, 2),
                 "dkv": (32, 32, warps, 2), "dq": (32, 32, warps, 2)}
    elif width <= 64:
        sizes = {"forward": (128, 64, 4, 3), "dkv": (64, 64, 4, 3), "dq": (64, 64, 4, 3)}
    elif width == 128:
        sizes = {"forward": (128, 64, 8, 3), "dkv": (64, 128, 8, 2), "dq": (128, 64, 8, 2)}
    else:
        sizes = {"forward": (64, 32, 8, 2), "dkv": (32, 32, 8, 2), "dq": (32, 32, 8, 2)}
    longest_q, longest_k = (max(SMALLEST, pl.next_power_of_2(a.shape[1])) for a in (q, k))
    tiles = {name: Tiles(min(tq, longest_q), min(tk, longest_k), warps, stages)
             for name, (tq, tk, warps, stages) in sizes.items()}
    return Plan(head_dim, exact=exact, interpret=interpret, **tiles)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def bias_of(key_mask: jax.Array | None) -> jax.Array | None:
    """bool [B, Nk] -> float32 [B, Nk]: 0 where a key may be seen, `MASKED` where not."""
    return None if key_mask is None else jnp.where(key_mask, 0.0, MASKED).astype(jnp.float32)


def load_rows(ref, start, size: int, rows: int, head_dim: int, *, whole: bool) -> jax.Array:
    """Rows start..start + size of ref [N, width], zeros beyond `rows` tokens and `head_dim` channels.

    whole: the caller knows that all those rows exist, which saves the comparison.
    """
    width = ref.shape[-1]
    inside = None
    if width != head_dim:
        inside = (jnp.arange(width) < head_dim)[None, :]
    if not whole:
        present = (start + jnp.arange(size) < rows)[:, None]
        inside = present if inside is None else inside & present
    at = ref.at[pl.ds(start, size), :]
    if inside is None:
        return plgpu.load(at)
    return plgpu.load(at, mask=jnp.broadcast_to(inside, (size, width)), other=0.0)


def load_vector(ref, start, size: int, rows: int, other: float, *, whole: bool) -> jax.Array:
    """The same for ref [N]; `other` beyond `rows`."""
    at = ref.at[pl.ds(start, size)]
    if whole:
        return plgpu.load(at)
    return plgpu.load(at, mask=start + jnp.arange(size) < rows, other=other)


def store_rows(ref, value: jax.Array, start, rows: int, head_dim: int) -> None:
    """value [size, width] -> ref [N, width] from `start`, leaving out what is padding."""
    size, width = value.shape
    inside = (start + jnp.arange(size) < rows)[:, None] & (jnp.arange(width) < head_dim)[None, :]
    plgpu.store(ref.at[pl.ds(start, size), :], value.astype(ref.dtype), mask=inside)


def store_vector(ref, value: jax.Array, start, rows: int) -> None:
    """value [size] -> ref [N] from `start`, leaving out what is padding."""
    size = value.shape[0]
    plgpu.store(ref.at[pl.ds(start, size)], value, mask=start + jnp.arange(size) < rows)


def dot(a: jax.Array, b: jax.Array, plan: Plan, *, transpose_b: bool = False) -> jax.Array:
    """a b or a b^T with float32 accumulation."""
    contract = ((1,), (1 if transpose_b else 0,))
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=plan.precision,
                               preferred_element_type=jnp.float32)


def tokens_of_head(length: int, width: int) -> pl.BlockSpec:
    """[B, N, heads, head_dim] seen by program (tile, batch, head) as [N, width]."""
    return pl.BlockSpec((None, length, None, width), lambda i, b, h: (b, 0, h, 0))


def rows_of_head(length: int) -> pl.BlockSpec:
    """[B, heads, N] seen as [N]."""
    return pl.BlockSpec((None, None, length), lambda i, b, h: (b, h, 0))


def rows_of_batch(length: int) -> pl.BlockSpec:
    """[B, N] seen as [N]."""
    return pl.BlockSpec((None, length), lambda i, b, h: (b, 0))
