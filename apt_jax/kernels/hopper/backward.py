"""Flash attention for Hopper, backward: scores are computed again from q, k and the saved log-sum-exp.

The equations and the two kernels are those of `flash/backward.py`: one makes dk and dv of 64 keys a
warpgroup (walking over the queries, everything transposed), one dq of 64 queries (walking over the
keys). No atomics, so the result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.kernels.flash.tiles import LOG2E, MASKED
from apt_jax.kernels.hopper import TILE
from apt_jax.kernels.hopper.machine import (
    COLUMN,
    COMPUTE,
    COMPUTE_REGISTERS,
    ROW,
    Machine,
    copy_ahead,
    kernel,
    last_first,
    per_column,
    per_row,
    shared,
)

NAME_DKV, NAME_DQ = "apt_hopper_dkv", "apt_hopper_dq"
ROWS = TILE // COMPUTE  # of a warpgroup: 64 queries of dq, or keys of dk and dv
LSE, DELTA = 0, 1  # of `rows`; the log-sum-exp there is one of base 2, as the scores are


def _dq_kernel(q_ref, k_ref, v_ref, dout_ref, rows_ref, count_ref, dq_ref, q_smem, dout_smem, rows_smem,
               k_smem, v_smem, own_ready, ready, free, *, machine: Machine):
    """q, dout, dq [B, Nq, heads, dim], k, v [B, Nk, heads, dim], rows [B, heads, 2, Nq] and the numbers
    of visible keys [B] in memory; tiles in shared memory, as many of k and v as there are slots."""
    slots, tile, dim = k_smem.shape
    b, h, wg = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    seen = jnp.int32(k_ref.shape[1] if count_ref is None else count_ref[b])
    tiles = lax.div(seen + (tile - 1), jnp.int32(tile))
    scale = dim**-0.5 * LOG2E

    @pl.when(wg < COMPUTE)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        start = (lax.axis_index("tile") * COMPUTE + wg) * ROWS
        q, dout, rows = q_smem.at[wg], dout_smem.at[wg], rows_smem.at[wg]
        here = pl.ds(start, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[b, here, h], q, own_ready.at[wg])
        plgpu.copy_gmem_to_smem(dout_ref.at[b, here, h], dout, own_ready.at[wg])
        plgpu.copy_gmem_to_smem(rows_ref.at[b, h, :, here], rows, own_ready.at[wg])
        plgpu.barrier_wait(own_ready.at[wg])
        lse = machine.vector(rows.at[LSE], ROW)
        delta = machine.vector(rows.at[DELTA], ROW)

        def step(i, dq, *, masked=False):
            slot = lax.rem(i, jnp.int32(slots))
            k, v = k_smem.at[slot], v_smem.at[slot]
            plgpu.barrier_wait(ready.at[slot])
            s, dp = machine.products([(q, k), (dout, v)])
            s = s * scale
            if masked:
                s = jnp.where(machine.positions(s.shape, 1) < seen - (tiles - 1) * tile, s, MASKED)
            ds = jnp.exp2(s - per_row(lse, s.shape)) * (dp - per_row(delta, s.shape))
            dq = machine.add_product(dq, ds.astype(q.dtype), k)
            plgpu.barrier_arrive(free.at[slot])
            return dq

        dq = step(0, machine.full((ROWS, dim), 0.0), masked=count_ref is not None)
        dq = lax.fori_loop(1, tiles, step, dq)
        q[...] = (dq * dim**-0.5).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[b, here, h])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == COMPUTE)
    def _():
        def copy(i, slot):
            here = last_first(i, tiles, tile)
            plgpu.copy_gmem_to_smem(k_ref.at[b, here, h], k_smem.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[b, here, h], v_smem.at[slot], ready.at[slot])

        copy_ahead(tiles, slots, [(free, copy)])


def _dkv_kernel(q_ref, k_ref, v_ref, dout_ref, rows_ref, count_ref, dk_ref, dv_ref, k_smem, v_smem,
                q_smem, dout_smem, rows_smem, own_ready, ready, free, *, machine: Machine):
    """As `_dq_kernel`; dk, dv [B, Nk, heads, dim]. Scores are transposed: [keys, queries]."""
    slots, tile, dim = q_smem.shape
    b, h, wg = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    tiles = q_ref.shape[1] // tile
    scale = dim**-0.5 * LOG2E

    @pl.when(wg < COMPUTE)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        start = (lax.axis_index("tile") * COMPUTE + wg) * ROWS
        k, v = k_smem.at[wg], v_smem.at[wg]
        here = pl.ds(start, ROWS)
        plgpu.copy_gmem_to_smem(k_ref.at[b, here, h], k, own_ready.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[b, here, h], v, own_ready.at[wg])
        plgpu.barrier_wait(own_ready.at[wg])

        def step(i, carry):
            dk, dv = carry
            slot = lax.rem(i, jnp.int32(slots))
            q, dout, rows = q_smem.at[slot], dout_smem.at[slot], rows_smem.at[slot]
            plgpu.barrier_wait(ready.at[slot])
            s, dp = machine.products([(k, q), (v, dout)])
            lse = machine.vector(rows.at[LSE], COLUMN)
            p = jnp.exp2(s * scale - per_column(lse, s.shape))
            delta = machine.vector(rows.at[DELTA], COLUMN)
            ds = p * (dp - per_column(delta, s.shape))
            dv = machine.add_product(dv, p.astype(q.dtype), dout)
            dk = machine.add_product(dk, ds.astype(q.dtype), q)
            plgpu.barrier_arrive(free.at[slot])
            return dk, dv

        zero = machine.full((ROWS, dim), 0.0)
        dk, dv = lax.fori_loop(0, tiles, step, (zero, zero))
        if count_ref is not None:  # whatever came out for hidden keys, also infinities
            visible = machine.positions(dk.shape, 0) < count_ref[b] - start
            dk, dv = (jnp.where(visible, x, 0.0) for x in (dk, dv))
        k[...] = (dk * dim**-0.5).astype(k.dtype)
        v[...] = dv.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_ref.at[b, here, h])
        plgpu.copy_smem_to_gmem(v, dv_ref.at[b, here, h])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == COMPUTE)
    def _():
        def copy(i, slot):
            here = pl.ds(i * tile, tile)
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, h], q_smem.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(dout_ref.at[b, here, h], dout_smem.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(rows_ref.at[b, h, :, here], rows_smem.at[slot], ready.at[slot])

        copy_ahead(tiles, slots, [(free, copy)])


def backward(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array | None, dout: jax.Array,
             lse: jax.Array, delta: jax.Array, *, tile: int, slots: int, machine: Machine
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv).

    Args:
      q, dout: [B, Nq, heads, dim]; k, v: [B, Nk, heads, dim]; count: int32 [B] or None, all as
        `forward` takes them; Nq and Nk multiples of 128.
      lse, delta: float32 [B, heads, Nq]; delta = rowsum(dout * out) - dlse.
      tile: queries or keys of a tile that is walked over. slots: such tiles in shared memory.
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    rows = jnp.stack([lse * LOG2E, delta], axis=2)  # [B, heads, 2, Nq]: one copy for both
    counts = () if count is None else (count,)
    pair, own = (lambda n: shared((n, tile, dim), q.dtype)), shared((COMPUTE, ROWS, dim), q.dtype)

    def call(kernel_of: Any, name: str, out: list[jax.Array], length: int, scratch: list[Any],
             copies: tuple[int, int]) -> Any:
        def body(*refs: Any) -> None:
            kernel_of(*refs[:5], *(() if counts else (None,)), *refs[5:], machine=machine)

        return kernel(
            body, name, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
            {"head": heads, "tile": length // (COMPUTE * ROWS), "batch": batch},
            [*scratch, plgpu.Barrier(num_arrivals=copies[0], num_barriers=COMPUTE),
             plgpu.Barrier(num_arrivals=copies[1], num_barriers=slots),
             plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots)],
            machine)(q, k, v, dout, rows, *counts)

    dk, dv = call(_dkv_kernel, NAME_DKV, [k, v], keys,
                  [own, own, pair(slots), pair(slots), plgpu.SMEM((slots, 2, tile), jnp.float32)],
                  (2, 3))
    (dq,) = call(_dq_kernel, NAME_DQ, [q], queries,
                 [own, own, plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32), pair(slots), pair(slots)],
                 (3, 2))
    return dq, dk, dv
