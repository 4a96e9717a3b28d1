"""Attention in plain JAX: exact everywhere, differentiable twice, the measure of every faster kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def oracle(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v; its [B, heads, Nq, Nk] scores lie in memory.

    Args and result as `kernels.attention.attention`. Zeros in a row without a key.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # [B, heads, Nq, Nk]
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    if key_mask is not None:
        out = zero_without_keys(out, key_mask)
    # Named, so that a rematerialisation policy can keep it (nn/stack.py).
    return checkpoint_name(out, "attention_out")


def zero_without_keys(out: jax.Array, key_mask: jax.Array) -> jax.Array:
    """out [B, Nq, heads, head_dim] with zeros for samples whose key_mask [B, Nk] is all False."""
    return jnp.where(key_mask.any(axis=1)[:, None, None, None], out, jnp.zeros((), out.dtype))
