"""Flash attention for Hopper, forward: two warpgroups take 64 queries each and walk over the keys.

For every tile of keys a warpgroup issues two products at once, this tile's scores and the last tile's
weights times values, and computes the softmax of the scores while the second still runs. The two
warpgroups take turns at issuing, so that one's softmax falls into the other's products. The last tile of
keys, which may have hidden ones, comes first: the loop has no mask.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.kernels.flash.tiles import EMPTY, LOG2E, MASKED
from apt_jax.kernels.hopper import TILE
from apt_jax.kernels.hopper.machine import (
    COMPUTE,
    COMPUTE_REGISTERS,
    Machine,
    copy_ahead,
    kernel,
    last_first,
    per_row,
    shared,
)

NAME = "apt_hopper_forward"
QUERIES = TILE // COMPUTE  # of a warpgroup: 64, the rows of one product


def _kernel(q_ref, k_ref, v_ref, count_ref, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem,
            q_ready, k_ready, v_ready, k_free, v_free, turn, *, machine: Machine):
    """q, out [B, Nq, heads, dim], k, v [B, Nk, heads, dim], lse [B, heads, Nq] and the numbers of visible
    keys [B] in memory; tiles in shared memory, as many of k and v as there are slots."""
    slots, tile, dim = k_smem.shape
    b, h, wg = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    seen = k_ref.shape[1] if count_ref is None else count_ref[b]
    seen = jnp.int32(seen)
    tiles = lax.div(seen + (tile - 1), jnp.int32(tile))
    scale = dim**-0.5 * LOG2E

    @pl.when(wg < COMPUTE)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        start = (lax.axis_index("tile") * COMPUTE + wg) * QUERIES
        q = q_smem.at[wg]
        plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(start, QUERIES), h], q, q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])

        def softmax(s, highest, total):
            """Scores -> their weights, the new maximum and sum, what older sums shrink by."""
            new = jnp.maximum(highest, s.max(axis=1) * scale)
            p = jnp.exp2(s * scale - per_row(new, s.shape))
            shrink = jnp.exp2(highest - new)
            return p.astype(q.dtype), new, total * shrink + p.sum(axis=1), shrink

        def first():
            plgpu.barrier_wait(k_ready.at[0])
            plgpu.barrier_wait(turn.at[wg])
            (s,) = machine.products([(q, k_smem.at[0])])
            plgpu.barrier_arrive(turn.at[1 - wg])
            plgpu.barrier_arrive(k_free.at[0])
            if count_ref is not None:
                here = machine.positions(s.shape, 1) < seen - (tiles - 1) * tile
                s = jnp.where(here, s, MASKED)
            p, highest, total, _ = softmax(
                s, machine.full((QUERIES,), EMPTY), machine.full((QUERIES,), 0.0))
            return machine.full((QUERIES, dim), 0.0), p, highest, total

        def step(i, carry):
            out, *state = carry
            slot, last = (lax.rem(j, jnp.int32(slots)) for j in (i, i - 1))
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[last])
            plgpu.barrier_wait(turn.at[wg])

            def issued():
                plgpu.barrier_arrive(turn.at[1 - wg])

            def meanwhile(s, p, highest, total, shrink):
                plgpu.barrier_arrive(k_free.at[slot])
                return softmax(s, highest, total)

            out, (p, highest, total, shrink) = machine.scores_while(
                q, k_smem.at[slot], out, v_smem.at[last], (*state, machine.full((QUERIES,), 1.0)),
                issued, meanwhile)
            plgpu.barrier_arrive(v_free.at[last])
            return out * per_row(shrink, out.shape), p, highest, total

        @pl.when(wg == 1)
        def _():
            plgpu.barrier_arrive(turn.at[0])  # the first goes first

        out, p, highest, total = lax.fori_loop(1, tiles, step, first())
        last = lax.rem(tiles - 1, jnp.int32(slots))
        plgpu.barrier_wait(v_ready.at[last])
        out = machine.add_product(out, p, v_smem.at[last])
        plgpu.barrier_arrive(v_free.at[last])

        @pl.when(wg == 0)
        def _():  # the second's last arrival, so that both end even
            plgpu.barrier_wait(turn.at[0])

        q[...] = (out / per_row(total, out.shape)).astype(q.dtype)
        lse_smem.at[wg][...] = (highest + jnp.log2(total)) / LOG2E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[b, pl.ds(start, QUERIES), h])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, h, pl.ds(start, QUERIES)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == COMPUTE)
    def _():
        def copies(memory, smem, ready):
            return lambda i, slot: plgpu.copy_gmem_to_smem(
                memory.at[b, last_first(i, tiles, tile), h], smem.at[slot], ready.at[slot])

        copy_ahead(tiles, slots, [(k_free, copies(k_ref, k_smem, k_ready)),
                                  (v_free, copies(v_ref, v_smem, v_ready))])


def forward(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array | None, *, tile: int,
            slots: int, machine: Machine) -> tuple[jax.Array, jax.Array]:
    """Attention and its log-sum-exp.

    Args:
      q: [B, Nq, heads, dim]; k, v: [B, Nk, heads, dim]; bfloat16 or float16, dim 64 or 128; Nq a
        multiple of 128, Nk one of `tile`.
      count: int32 [B], how many of the first keys are visible, at least 1; None for all of them.
      tile: keys of a tile. slots: tiles of k and of v in shared memory.
    Returns: out like q, lse float32 [B, heads, Nq] of the scaled scores.
    """
    batch, queries, heads, dim = q.shape

    def body(*refs: Any) -> None:
        _kernel(*refs[:3], *(() if count is not None else (None,)), *refs[3:], machine=machine)

    out, lse = kernel(
        body, NAME, [jax.ShapeDtypeStruct(q.shape, q.dtype),
                     jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)],
        {"head": heads, "tile": queries // (COMPUTE * QUERIES), "batch": batch},
        [shared((COMPUTE, QUERIES, dim), q.dtype), shared((slots, tile, dim), q.dtype),
         shared((slots, tile, dim), q.dtype), plgpu.SMEM((COMPUTE, QUERIES), jnp.float32),
         plgpu.Barrier(num_barriers=COMPUTE), plgpu.Barrier(num_barriers=slots),
         plgpu.Barrier(num_barriers=slots),
         plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
         plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
         plgpu.Barrier(num_barriers=COMPUTE)],
        machine)(q, k, v, *(() if count is None else (count,)))
    return out, lse
