"""The time shift (Eq. 7) and the draws of t. t lives in [0, 1] everywhere in this package."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def shift_time(t: jax.Array, s: float) -> jax.Array:
    """shift(t, s) = s t / (1 + (s - 1) t) (Eq. 7), t in [0, 1], s > 0; fixes 0 and 1."""
    return s * t / (1 + (s - 1) * t)


def uniform_time(keys: jax.Array, s: float) -> jax.Array:
    """t ~ shift(U(0, 1), s), float32 [B], one draw per key (Sec. 3.3: s = 1 images, 12 videos)."""
    return shift_time(jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys), s)


def logit_normal_time(keys: jax.Array, s: float, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """t ~ shift(sigmoid(N(mean, std^2)), s), float32 [B]: pre-training's draw (ours, see method)."""
    normal = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys)
    return shift_time(jax.nn.sigmoid(mean + std * normal), s)


def time_grid(steps: int, s: float) -> jax.Array:
    """The steps + 1 times shift(i / steps, s), increasing from 0 to 1, float32."""
    return shift_time(jnp.arange(steps + 1, dtype=jnp.float32) / steps, s)
