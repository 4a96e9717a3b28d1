"""Flash attention, backward: scores are computed again from q, k and the saved log-sum-exp.

With p = exp(s - lse), the weights, and delta = rowsum(dout * out) - dlse:
    dv = p^T dout        ds = p * (dout v^T - delta)        dq = ds k * scale        dk = ds^T q * scale
One kernel makes dk and dv of a tile of keys (walking over the queries), one makes dq of a tile of
queries (walking over the keys): no atomics, so the result is the same in every run.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from apt_jax.kernels.flash import tiles
from apt_jax.kernels.flash.tiles import LOG2E, MASKED, Plan

NAME_DKV, NAME_DQ = "apt_flash_dkv", "apt_flash_dq"


def _dkv_kernel(q_ref, k_ref, v_ref, bias_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, *,
                plan: Plan, queries: int, keys: int):
    """Refs of one (batch, head): q, dout [Nq, width]; k, v, dk, dv [Nk, width]; bias [Nk];
    lse, delta [Nq]. Everything below is transposed, [tk, tq], so that no tile has to be turned."""
    tq, tk, dim = plan.dkv.q, plan.dkv.k, plan.head_dim
    start_k = pl.program_id(0) * tk
    whole_k = keys % tk == 0
    k = tiles.load_rows(k_ref, start_k, tk, keys, dim, whole=whole_k)
    v = tiles.load_rows(v_ref, start_k, tk, keys, dim, whole=whole_k)
    bias = None
    if bias_ref is not None:
        bias = tiles.load_vector(bias_ref, start_k, tk, keys, MASKED, whole=whole_k)[:, None]
    scale = dim**-0.5 * LOG2E

    def step(start, carry, *, whole):
        dk, dv = carry
        # Queries beyond the end are zeros with lse 0 and dout 0: they add nothing.
        q = tiles.load_rows(q_ref, start, tq, queries, dim, whole=whole)
        lse = tiles.load_vector(lse_ref, start, tq, queries, 0.0, whole=whole) * LOG2E
        s = tiles.dot(k, q, plan, transpose_b=True) * scale  # [tk, tq]
        if bias is not None:
            s = s + bias
        p = jnp.exp2(s - lse[None, :])
        dout = tiles.load_rows(dout_ref, start, tq, queries, dim, whole=whole)
        dv = dv + tiles.dot(p.astype(dout.dtype), dout, plan)
        dp = tiles.dot(v, dout, plan, transpose_b=True)  # [tk, tq]
        delta = tiles.load_vector(delta_ref, start, tq, queries, 0.0, whole=whole)
        ds = p * (dp - delta[None, :])
        dk = dk + tiles.dot(ds.astype(q.dtype), q, plan)
        return dk, dv

    zero = jnp.zeros((tk, plan.width), jnp.float32)
    carry = (zero, zero)
    full = queries // tq
    if full:
        carry = jax.lax.fori_loop(0, full, lambda i, c: step(i * tq, c, whole=True), carry)
    if queries % tq:
        carry = step(full * tq, carry, whole=False)
    dk, dv = carry
    tiles.store_rows(dk_ref, dk * dim**-0.5, start_k, keys, dim)
    tiles.store_rows(dv_ref, dv, start_k, keys, dim)


def _dq_kernel(q_ref, k_ref, v_ref, bias_ref, dout_ref, lse_ref, delta_ref, dq_ref, *,
               plan: Plan, queries: int, keys: int):
    """Refs as in `_dkv_kernel`; dq [Nq, width]."""
    tq, tk, dim = plan.dq.q, plan.dq.k, plan.head_dim
    start_q = pl.program_id(0) * tq
    whole_q = queries % tq == 0
    q = tiles.load_rows(q_ref, start_q, tq, queries, dim, whole=whole_q)
    dout = tiles.load_rows(dout_ref, start_q, tq, queries, dim, whole=whole_q)
    lse = tiles.load_vector(lse_ref, start_q, tq, queries, 0.0, whole=whole_q) * LOG2E
    delta = tiles.load_vector(delta_ref, start_q, tq, queries, 0.0, whole=whole_q)
    scale = dim**-0.5 * LOG2E

    def step(start, dq, *, whole):
        k = tiles.load_rows(k_ref, start, tk, keys, dim, whole=whole)
        s = tiles.dot(q, k, plan, transpose_b=True) * scale  # [tq, tk]
        if bias_ref is not None:
            s = s + tiles.load_vector(bias_ref, start, tk, keys, MASKED, whole=whole)[None, :]
        elif not whole:
            s = jnp.where((start + jnp.arange(tk) < keys)[None, :], s, MASKED)
        p = jnp.exp2(s - lse[:, None])
        v = tiles.load_rows(v_ref, start, tk, keys, dim, whole=whole)
        dp = tiles.dot(dout, v, plan, transpose_b=True)
        ds = p * (dp - delta[:, None])
        return dq + tiles.dot(ds.astype(k.dtype), k, plan)

    dq = jnp.zeros((tq, plan.width), jnp.float32)
    full = keys // tk
    if full:
        dq = jax.lax.fori_loop(0, full, lambda i, c: step(i * tk, c, whole=True), dq)
    if keys % tk:
        dq = step(full * tk, dq, whole=False)
    tiles.store_rows(dq_ref, dq * dim**-0.5, start_q, queries, dim)


def backward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, dout: jax.Array,
             lse: jax.Array, delta: jax.Array, plan: Plan
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv) of one block of keys.

    Args:
      q, dout: [B, Nq, heads, head_dim]; k, v: [B, Nk, heads, head_dim]; bias float32 [B, Nk].
      lse, delta: float32 [B, heads, Nq], over all keys of the row, also those of other blocks.
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]

    def call(kernel, name, plan_of, tiles_of, like):
        padded_q = tiles.round_up(queries, plan_of.q)
        padded_k = tiles.round_up(keys, plan_of.k)
        of_q = tiles.tokens_of_head(padded_q, plan.width)
        of_k = tiles.tokens_of_head(padded_k, plan.width)
        row = tiles.rows_of_head(padded_q)
        outs = [of_k if array is k else of_q for array in like]
        return pl.pallas_call(
            functools.partial(kernel, plan=plan, queries=queries, keys=keys),
            grid=(padded_q // plan_of.q if tiles_of == "q" else padded_k // plan_of.k, batch, heads),
            in_specs=[of_q, of_k, of_k, None if bias is None else tiles.rows_of_batch(padded_k),
                      of_q, row, row],
            out_specs=outs,
            out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in like],
            compiler_params=plgpu.CompilerParams(num_warps=plan_of.warps,
                                                 num_stages=plan_of.stages),
            interpret=plan.interpret,
            name=name,
        )(q, k, v, bias, dout, lse, delta)

    dk, dv = call(_dkv_kernel, NAME_DKV, plan.dkv, "k", [k, k])
    (dq,) = call(_dq_kernel, NAME_DQ, plan.dq, "q", [q])
    return dq, dk, dv
