"""Plain attention whose gradient starts from what the forward pass returned.

XLA differentiates the oracle by going back through softmax, for which it keeps or computes again the
[B, heads, Nq, Nk] weights, their maximum and their sum. From the output and the log-sum-exp the
weights are one exponential of the scores, as in the flash kernels: on a CPU, where passes over the
scores are most of attention's time, that spares three of them (docs/benches.md). Both carry the
names that rematerialisation policies keep (nn/stack.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from apt_jax.kernels import choice
from apt_jax.kernels.normalize import total
from apt_jax.kernels.oracle import zero_without_keys

# Added to the scores of hidden keys: finite, so that a row without a key has no NaN on its way.
HIDDEN = -1e30


def xla(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v of arrays of one dtype; differentiable in reverse mode,

    more than once too. Args and result as `kernels.attention.attention`. Zeros in a row without a key.
    """
    if key_mask is None:
        return _attend(q, k, v, None)
    bias = jnp.where(key_mask, 0.0, HIDDEN).astype(_wide(q))[:, None, None, :]  # [B, 1, 1, Nk]
    return zero_without_keys(_attend(q, k, v, bias), key_mask)


@jax.custom_vjp
def _attend(q, k, v, bias):
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    scores = _scores(q, k, bias)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)  # [B, heads, Nq, Nk], not divided by their sum yet
    sums = _sum(weights)
    out = jnp.einsum("bhqk,bkhd->bhqd", weights.astype(v.dtype), v, preferred_element_type=_wide(q))
    out = jnp.swapaxes(out / sums, 1, 2).astype(v.dtype)  # [B, Nq, heads, head_dim]
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(top + jnp.log(sums), "attention_lse")  # [B, heads, Nq, 1]
    return out, (q, k, v, bias, out, lse)


def _backward(residuals, dout):
    q, k, v, bias, out, lse = residuals
    scale, wide = q.shape[-1] ** -0.5, _wide(q)
    weights = jnp.exp(_scores(q, k, bias) - lse)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights.astype(v.dtype), dout)
    dweights = jnp.einsum("bqhd,bkhd->bhqk", dout, v, preferred_element_type=wide)
    delta = _sum(dout.astype(wide) * out.astype(wide))  # [B, Nq, heads, 1]
    delta = jnp.swapaxes(delta, 1, 2)
    dscores = (weights * (dweights - delta)).astype(q.dtype)
    dq = jnp.einsum("bhqk,bkhd->bqhd", dscores, k, preferred_element_type=wide) * scale
    dk = jnp.einsum("bhqk,bqhd->bkhd", dscores, q, preferred_element_type=wide) * scale
    # A mask is no variable: its bias gets no gradient.
    return dq.astype(q.dtype), dk.astype(k.dtype), dv, None


_attend.defvjp(_forward, _backward)


def _scores(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    wide, scale = _wide(q), q.shape[-1] ** -0.5
    if q.dtype == wide:  # a pass over the queries, not over the scores; bfloat16 would round it
        q, scale = q * scale, 1.0
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
    scores = scores if scale == 1.0 else scores * scale
    return scores if bias is None else scores + bias


def _sum(x: jax.Array) -> jax.Array:
    """Over the last axis, kept."""
    if choice.hardware().platform == "cpu":
        return total(x)  # why: kernels/normalize.py
    return x.sum(axis=-1, keepdims=True)


def _wide(x: jax.Array) -> jnp.dtype:
    """The dtype of scores and sums: float32, or wider where the arrays are."""
    return jnp.promote_types(x.dtype, jnp.float32)
