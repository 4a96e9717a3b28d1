"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def guided_velocity(
    velocity: Velocity,
    x: jax.Array,
    t: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    null_text: jax.Array,
    null_mask: jax.Array,
    guidance: float | jax.Array,
) -> jax.Array:
    """v_null + guidance (v_text - v_null); both sides in one call with a new leading axis.

    Args: x [B, ...], t [B], text [B, L, D], text_mask [B, L]; null_text [L, D] and null_mask [L] are
      the states of the one fixed negative prompt, the same for every sample.
    The new axis (not a longer batch) keeps the batch axis sharded as it was.
    """
    texts = jnp.stack([text, jnp.broadcast_to(null_text, text.shape)])  # [2, B, L, D]
    masks = jnp.stack([text_mask, jnp.broadcast_to(null_mask, text_mask.shape)])  # [2, B, L]
    with_text, without = jax.vmap(velocity, in_axes=(None, None, 0, 0))(x, t, texts, masks)
    return without + guidance * (with_text - without)
