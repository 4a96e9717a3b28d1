"""Flash attention, forward: one program per tile of queries walks over the keys (online softmax)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from apt_jax.kernels.flash import tiles
from apt_jax.kernels.flash.tiles import EMPTY, LOG2E, MASKED, Plan

NAME = "apt_flash_forward"


def _kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, lse_ref, *, plan: Plan, queries: int, keys: int):
    """Refs of one (batch, head): q, out [Nq, width]; k, v [Nk, width]; bias [Nk]; lse [Nq]."""
    tq, tk, dim = plan.forward.q, plan.forward.k, plan.head_dim
    start_q = pl.program_id(0) * tq
    q = tiles.load_rows(q_ref, start_q, tq, queries, dim, whole=queries % tq == 0)
    scale = dim**-0.5 * LOG2E

    def step(start, carry, *, whole):
        acc, highest, total = carry  # [tq, width], [tq], [tq]
        k = tiles.load_rows(k_ref, start, tk, keys, dim, whole=whole)
        s = tiles.dot(q, k, plan, transpose_b=True) * scale  # [tq, tk]
        if bias_ref is not None:
            s = s + tiles.load_vector(bias_ref, start, tk, keys, MASKED, whole=whole)[None, :]
        elif not whole:
            s = jnp.where((start + jnp.arange(tk) < keys)[None, :], s, MASKED)
        new = jnp.maximum(highest, s.max(axis=1))
        shrink = jnp.exp2(highest - new)
        p = jnp.exp2(s - new[:, None])
        v = tiles.load_rows(v_ref, start, tk, keys, dim, whole=whole)
        acc = acc * shrink[:, None] + tiles.dot(p.astype(v.dtype), v, plan)
        return acc, new, total * shrink + p.sum(axis=1)

    carry = (jnp.zeros((tq, plan.width), jnp.float32), jnp.full((tq,), EMPTY, jnp.float32),
             jnp.zeros((tq,), jnp.float32))
    full = keys // tk
    if full:
        carry = jax.lax.fori_loop(0, full, lambda i, c: step(i * tk, c, whole=True), carry)
    if keys % tk:
        carry = step(full * tk, carry, whole=False)
    acc, highest, total = carry

    empty = total == 0
    out = acc / jnp.where(empty, 1.0, total)[:, None]
    lse = jnp.where(empty, EMPTY, (highest + jnp.log2(jnp.where(empty, 1.0, total))) / LOG2E)
    tiles.store_rows(out_ref, out, start_q, queries, dim)
    tiles.store_vector(lse_ref, lse, start_q, queries)


def forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, plan: Plan
            ) -> tuple[jax.Array, jax.Array]:
    """q [B, Nq, heads, head_dim], k, v [B, Nk, heads, head_dim], bias float32 [B, Nk] or None ->

    out like q, and the log-sum-exp of each row's scaled scores, float32 [B, heads, Nq].
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    padded_q, padded_k = (tiles.round_up(n, t) for n, t in
                          ((queries, plan.forward.q), (keys, plan.forward.k)))
    of_q = tiles.tokens_of_head(padded_q, plan.width)
    of_k = tiles.tokens_of_head(padded_k, plan.width)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, queries=queries, keys=keys),
        grid=(padded_q // plan.forward.q, batch, heads),
        in_specs=[of_q, of_k, of_k, None if bias is None else tiles.rows_of_batch(padded_k)],
        out_specs=[of_q, tiles.rows_of_head(padded_q)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype),
                   jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=plan.forward.warps,
                                             num_stages=plan.forward.stages),
        interpret=plan.interpret,
        name=NAME,
    )(q, k, v, bias)
