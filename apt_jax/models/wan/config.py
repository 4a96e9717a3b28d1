"""Sizes of a Wan 2.1 transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from apt_jax.nn.embeddings import token_grid


def wan_rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Rotary channels of frames, rows and columns: rows and columns get a third each, rounded down
    to pairs, and frames the rest (44, 42, 42 of 128)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """width = heads * head_dim; mlp_ratio is the MLPs' hidden width over width (1.3B: 8960 / 1536).

    An image-to-video network has more in_channels than out_channels: the condition frame's latents
    and their mask follow the noisy latents along the channels. Its image tokens would be a second
    context of each block's cross attention.
    """

    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 1536
    depth: int = 30
    heads: int = 12
    head_dim: int = 128
    rope_theta: float = 10_000.0
    text_width: int = 4096
    text_tokens: int = 512  # text is filled up with zeros to this length; 0 leaves it as it is
    frequency_width: int = 256  # channels of the sinusoidal time features
    mlp_ratio: float = 8960 / 1536
    dtype: str = "float32"
    remat: str = "none"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        return wan_rope_axes(self.head_dim)

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Token grid (F', H', W') of a sample [B, F, H, W, C]; ValueError if patches do not fit."""
        return token_grid(shape, self.patch)
