"""Scaled dot-product attention: the oracle against which every faster kernel is held."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v with a float32 softmax.

    Args:
      q: [B, Nq, heads, head_dim]; k, v: [B, Nk, heads, head_dim]; float32 or bfloat16.
      key_mask: bool [B, Nk], False for keys that nobody may look at; None for no padding. A row with
        no key left is undefined.
    Returns: [B, Nq, heads, head_dim] in q's dtype. Differentiable any number of times.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # [B, heads, Nq, Nk]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
