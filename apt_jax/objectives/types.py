"""What every objective is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Nets(NamedTuple):
    """The networks as pure functions of their parameters."""

    velocity: Any  # (params, x, t, text, text_mask) -> [B, F, H, W, C]
    discriminate: Any = None  # (params, x, t, text, text_mask) -> [B]


def split_keys(keys: jax.Array, n: int) -> jax.Array:
    """One key per sample [B] -> n independent keys per sample [n, B]."""
    return jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(keys)


def mean_square(error: jax.Array) -> jax.Array:
    """Mean of squares over all axes but the first: [B, ...] -> [B]."""
    return (error**2).mean(axis=tuple(range(1, error.ndim)))
