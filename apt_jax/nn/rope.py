"""Rotary position embedding over (frame, row, column), as in the public MMDiT and in Wan.

MMDiT counts rows and columns from the centre of the picture (so positions are negative on one half),
Wan from 0; frames count from 0. MMDiT's text tokens count from the first position beyond the
picture's half size, the same on all three axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """cos and sin, float32 [N, head_dim / 2]: one angle for each pair of channels of each token;

    [B, N, head_dim / 2] where samples have their tokens in different orders.
    """

    cos: jax.Array
    sin: jax.Array


def _angles(positions: jax.Array, dim: int, theta: float) -> jax.Array:
    rates = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return positions.astype(jnp.float32)[:, None] * rates  # [P, dim / 2]


def _centred(n: int) -> jax.Array:
    return jnp.arange(n) - (n - n // 2)


def video_rotation(
    grid: tuple[int, int, int], axes: tuple[int, int, int], theta: float, *, centred: bool = True
) -> Rotation:
    """Rotation of the visual tokens of grid (F', H', W'), in patchify's order; axes sum to head_dim.

    centred: count rows and columns from the centre (MMDiT), or from 0 (Wan).
    """
    f, h, w = grid
    side = _centred if centred else jnp.arange
    parts = [
        jnp.broadcast_to(_angles(jnp.arange(f), axes[0], theta)[:, None, None], (f, h, w, axes[0] // 2)),
        jnp.broadcast_to(_angles(side(h), axes[1], theta)[None, :, None], (f, h, w, axes[1] // 2)),
        jnp.broadcast_to(_angles(side(w), axes[2], theta)[None, None], (f, h, w, axes[2] // 2)),
    ]
    angle = jnp.concatenate(parts, axis=-1).reshape(f * h * w, -1)  # [N, head_dim / 2]
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def text_rotation(
    length: int, grid: tuple[int, int, int], axes: tuple[int, int, int], theta: float
) -> Rotation:
    """Rotation of `length` text tokens that go with a picture of grid (F', H', W')."""
    positions = jnp.arange(length) + max(grid[1] // 2, grid[2] // 2)
    angle = jnp.concatenate([_angles(positions, a, theta) for a in axes], axis=-1)
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def longer(rotation: Rotation, count: int) -> Rotation:
    """With `count` tokens behind it that are padding: what they turn becomes zero."""
    pads = ((0, 0),) * (rotation.cos.ndim - 2) + ((0, count), (0, 0))
    return Rotation(*(jnp.pad(x, pads) for x in rotation)) if count else rotation


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn each neighbouring pair of channels of x [B, N, heads, head_dim] by its token's angle."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]  # [B, N, heads, head_dim / 2]
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]  # [..., N, 1, head_dim / 2]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
