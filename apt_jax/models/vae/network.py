"""The causal video VAE of Wan 2.1 and Qwen-Image as two modules: one chunk in, one chunk out.

Parameters of both: encoder/, quant/, post_quant/ and decoder/; kernels are [*window, d_in, d_out].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.models.vae.config import VAEConfig
from apt_jax.models.vae.layers import (
    CausalConv,
    Downsample,
    FrameAttention,
    Norm,
    Pointwise,
    ResidualBlock,
    Upsample,
)
from apt_jax.models.vae.walk import Walk


class Middle(nnx.Module):
    """Residual block, attention, residual block, at the latent's resolution."""

    def __init__(self, dim: int, *, form: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.block0 = ResidualBlock(dim, dim, form=form, dtype=dtype, rngs=rngs)
        self.attention = FrameAttention(dim, dtype=dtype, rngs=rngs)
        self.block1 = ResidualBlock(dim, dim, form=form, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        return self.block1(self.attention(self.block0(x, walk), walk), walk)


class Stage(nnx.Module):
    """Residual blocks of one resolution, then the step to the next one where there is one."""

    def __init__(self, d_in: int, d_out: int, blocks: int, *, form: str, dtype: jnp.dtype,
                 rngs: nnx.Rngs):
        self.count = blocks
        for i in range(blocks):
            setattr(self, f"block{i}", ResidualBlock(
                d_in if i == 0 else d_out, d_out, form=form, dtype=dtype, rngs=rngs))

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        for i in range(self.count):
            x = getattr(self, f"block{i}")(x, walk)
        for step in ("down", "up"):
            if hasattr(self, step):
                x = getattr(self, step)(x, walk)
        return x


class Encoder(nnx.Module):
    """Pixels [B, F, H, W, 3] -> [B, F', H', W', 2 * 16]: mean and log variance before `quant`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        form = {"form": config.convolution, **make}
        widths = [config.base * m for m in (1, *config.multipliers)]
        self.stages = len(config.multipliers)
        self.conv_in = CausalConv(config.channels, widths[0], **form)
        for i in range(self.stages):
            stage = Stage(widths[i], widths[i + 1], config.blocks, **form)
            if i + 1 < self.stages:
                stage.down = Downsample(widths[i + 1], config.temporal[i], **make)
            setattr(self, f"stage{i}", stage)
        self.mid = Middle(widths[-1], **form)
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, **form)

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        x = self.conv_in(x, walk)
        for i in range(self.stages):
            x = getattr(self, f"stage{i}")(x, walk)
        x = self.mid(x, walk)
        return self.conv_out(self.norm_out.silu(x), walk)


class Decoder(nnx.Module):
    """Latents [B, F', H', W', 16] after `post_quant` -> pixels [B, F, H, W, 3]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        form = {"form": config.convolution, **make}
        widths = [config.base * m for m in config.multipliers[::-1]]
        temporal = config.temporal[::-1]
        self.stages = len(widths)
        self.conv_in = CausalConv(config.latent_channels, widths[0], **form)
        self.mid = Middle(widths[0], **form)
        for i, width in enumerate(widths):
            d_in = widths[i - 1] // 2 if i else width  # the step before halved the channels
            stage = Stage(d_in, width, config.blocks + 1, **form)
            if i + 1 < self.stages:
                stage.up = Upsample(width, temporal[i], **make)
            setattr(self, f"stage{i}", stage)
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.channels, **form)

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        x = self.mid(self.conv_in(x, walk), walk)
        for i in range(self.stages):
            x = getattr(self, f"stage{i}")(x, walk)
        return self.conv_out(self.norm_out.silu(x), walk)


class EncodingHalf(nnx.Module):
    """Parameters: encoder/ and quant/."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.quant = Pointwise((1, 1, 1), *(2 * config.latent_channels,) * 2,
                               dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        """Pixels in [-1, 1] [B, F, H, W, 3] -> moments [B, F', H', W', 32]: mean, log variance."""
        return self.quant(self.encoder(x.astype(self.config.dtype), walk))


class DecodingHalf(nnx.Module):
    """Parameters: post_quant/ and decoder/."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.post_quant = Pointwise((1, 1, 1), *(config.latent_channels,) * 2,
                                    dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.config = config

    def __call__(self, z: jax.Array, walk: Walk) -> jax.Array:
        """Latents [B, F', H', W', 16], not normalised -> pixels [B, F, H, W, 3], not clamped."""
        return self.decoder(self.post_quant(z.astype(self.config.dtype)), walk)
