"""Time embedding, and the cut of a sample into patch tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.nn.linear import linear

FREQUENCIES = 256  # channels of the sinusoidal embedding where nothing else is said
TIME_SCALE = 1000.0  # t in [0, 1] is embedded as if in [0, 1000]; t itself never leaves [0, 1]


def sinusoidal(t: jax.Array, channels: int = FREQUENCIES) -> jax.Array:
    """[B] in [0, 1] -> float32 [B, 256]: cosines, then sines, of 1000 t at frequencies 10000^(-i/128).

    The same with another even number of channels instead of 256.
    """
    half = channels // 2
    rates = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = TIME_SCALE * t.astype(jnp.float32)[:, None] * rates  # [B, 128]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # [B, 256]


class TimeEmbedding(nnx.Module):
    """t [B] -> [B, width]: sinusoidal features, linear, SiLU, linear."""

    def __init__(self, width: int, channels: int = FREQUENCIES, *, dtype: jnp.dtype,
                 rngs: nnx.Rngs):
        self.channels = channels
        self.hidden = linear(channels, width, dtype=dtype, rngs=rngs)
        self.out = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.out(jax.nn.silu(self.hidden(sinusoidal(t, self.channels))))


def token_grid(shape: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Token grid (F', H', W') of a sample [B, F, H, W, C]; ValueError when patches do not fit."""
    sizes = tuple(shape[1:4])
    if any(s % p for s, p in zip(sizes, patch)):
        raise ValueError(f"frames, height, width {sizes} are not multiples of patch {patch}")
    return tuple(s // p for s, p in zip(sizes, patch))


def patchify(x: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """[B, F, H, W, C] -> tokens [B, F' H' W', C pt ph pw], channel-major inside a token.

    Channel-major is the order in which Qwen-Image packs its latents, so weights carry over.
    """
    b, f, h, w, c = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, f // pt, pt, h // ph, ph, w // pw, pw, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # [B, F', H', W', C, pt, ph, pw]
    return x.reshape(b, (f // pt) * (h // ph) * (w // pw), c * pt * ph * pw)


def unpatchify(
    tokens: jax.Array, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> jax.Array:
    """Inverse of `patchify`: tokens [B, N, C pt ph pw] on grid (F', H', W') -> [B, F, H, W, C]."""
    b = tokens.shape[0]
    (gf, gh, gw), (pt, ph, pw) = grid, patch
    c = tokens.shape[-1] // (pt * ph * pw)
    x = tokens.reshape(b, gf, gh, gw, c, pt, ph, pw)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)  # [B, F', pt, H', ph, W', pw, C]
    return x.reshape(b, gf * pt, gh * ph, gw * pw, c)
