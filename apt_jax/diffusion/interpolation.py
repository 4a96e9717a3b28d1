"""The straight path between a sample and noise (Sec. 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def per_sample(t: jax.Array, like: jax.Array) -> jax.Array:
    """t [B] -> [B, 1, ..., 1] with as many axes as `like`."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = (1 - t) x + t z, for x, z [B, ...] and t [B] in [0, 1]; t = 1 is pure noise."""
    t = per_sample(t, x)
    return (1 - t) * x + t * z


def velocity_target(x: jax.Array, z: jax.Array) -> jax.Array:
    """v = z - x, the derivative of x_t."""
    return z - x


def clean(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """x = x_t - t v: the sample that the velocity points back to."""
    return x_t - per_sample(t, x_t) * v


def noise_like(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape], each sample from its own key in keys [B].

    A key per sample makes the draw independent of sharding and of gradient accumulation.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
