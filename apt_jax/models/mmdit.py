"""MMDiT: two streams (text, video) with joint attention (Sec. 3.1, Fig. 1).

With modulation="per_block" the mathematics is that of diffusers' QwenImageTransformer2DModel;
modulation="shared" has one modulation vector for the whole network plus learned offsets per block and
stream, which is how the 8B preset gets its parameter count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels import dispatch, fit
from apt_jax.kernels.attention import joint_attention
from apt_jax.kernels.scope import per_sample
from apt_jax.models.inputs import check_inputs
from apt_jax.nn.embeddings import TimeEmbedding, patchify, token_grid, unpatchify
from apt_jax.nn.linear import MLP, linear
from apt_jax.nn.modulation import add_gated, modulate, split_modulation
from apt_jax.nn.norm import RMSNorm, layer_norm
from apt_jax.nn.rope import Rotation, longer, rotate, text_rotation, video_rotation
from apt_jax.nn.stack import run_stack, stack


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT. width = heads * head_dim; rope_axes (frame, row, column) sum to head_dim."""

    in_channels: int = 3
    out_channels: int = 3
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 128
    depth: int = 4
    heads: int = 4
    head_dim: int = 32
    rope_axes: tuple[int, int, int] = (8, 12, 12)
    rope_theta: float = 10_000.0
    text_width: int = 384
    mlp_ratio: float = 4.0
    modulation: str = "per_block"
    dtype: str = "float32"
    remat: str = "none"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Token grid (F', H', W') of a sample [B, F, H, W, C]; ValueError when patches do not fit."""
        return token_grid(shape, self.patch)


class Stream(nnx.Module):
    """One stream's weights in a block: modulation, QKV with QK norm, output projection, MLP."""

    def __init__(self, c: MMDiTConfig, *, rngs: nnx.Rngs):
        dt = c.compute_dtype
        self.heads = c.heads
        if c.modulation == "per_block":
            self.modulation = linear(c.width, 6 * c.width, dtype=dt, rngs=rngs, zero=True)
        else:
            self.modulation = nnx.Param(jnp.zeros((6 * c.width,), jnp.float32))
        self.qkv = linear(c.width, 3 * c.width, dtype=dt, rngs=rngs)
        self.q_norm = RMSNorm(c.head_dim)
        self.k_norm = RMSNorm(c.head_dim)
        self.out = linear(c.width, c.width, dtype=dt, rngs=rngs)
        self.mlp = MLP(c.width, c.mlp_ratio, dtype=dt, rngs=rngs)

    def modulations(self, condition: jax.Array):
        """condition: SiLU of the time embedding [B, D] (per block), or the shared vector [B, 6 D]."""
        if isinstance(self.modulation, nnx.Linear):
            return split_modulation(self.modulation(condition))
        return split_modulation(condition + self.modulation[...].astype(condition.dtype))

    def project(self, x: jax.Array, rotation: Rotation):
        """x [B, N, D] -> rotated, normalised q and k, and v, each [B, N, heads, head_dim]."""
        b, n, _ = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(b, n, 3 * self.heads, -1), 3, axis=2)
        return rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation), v


class Block(nnx.Module):
    """Joint attention over all text and video tokens, then each stream's own MLP."""

    def __init__(self, c: MMDiTConfig, *, rngs: nnx.Rngs):
        self.video = Stream(c, rngs=rngs)
        self.text = Stream(c, rngs=rngs)

    def __call__(self, video, text, condition, rotations, key_mask, hidden_last=False):
        """key_mask: bool [B, L + N] of the text's and then the video's tokens; with hidden_last (see

        `kernels.attention`) of the video's first, so that hidden text is behind all else.
        """
        video_attn, video_mlp = self.video.modulations(condition)
        text_attn, text_mlp = self.text.modulations(condition)

        qv, kv, vv = self.video.project(modulate(video, video_attn), rotations[0])
        qt, kt, vt = self.text.project(modulate(text, text_attn), rotations[1])
        if hidden_last:
            to_video, to_text = joint_attention((qv, qt), (kv, kt), (vv, vt), key_mask,
                                                hidden_last=True)
        else:
            to_text, to_video = joint_attention((qt, qv), (kt, kv), (vt, vv), key_mask)
        text = add_gated(text, text_attn, self.text.out(to_text.reshape(text.shape)))
        video = add_gated(video, video_attn, self.video.out(to_video.reshape(video.shape)))

        video = add_gated(video, video_mlp, self.video.mlp(modulate(video, video_mlp)))
        text = add_gated(text, text_mlp, self.text.mlp(modulate(text, text_mlp)))
        return video, text


class Backbone(nnx.Module):
    """Embeddings and blocks: what generator and discriminator share."""

    def __init__(self, c: MMDiTConfig, *, rngs: nnx.Rngs):
        dt = c.compute_dtype
        pt, ph, pw = c.patch
        self.config = c
        self.video_in = linear(c.in_channels * pt * ph * pw, c.width, dtype=dt, rngs=rngs)
        self.text_norm = RMSNorm(c.text_width)
        self.text_in = linear(c.text_width, c.width, dtype=dt, rngs=rngs)
        self.time = TimeEmbedding(c.width, dtype=dt, rngs=rngs)
        if c.modulation == "shared":
            self.modulation = linear(c.width, 6 * c.width, dtype=dt, rngs=rngs, zero=True)
        self.blocks = stack(lambda r: Block(c, rngs=r), c.depth, rngs)

    def __call__(self, x, t, text, text_mask, taps: Sequence[int] = ()):
        """x [B, F, H, W, C], t [B], text [B, L, text_width], text_mask bool [B, L] ->

        visual tokens [B, N, D] after the last block, the list of those after `taps`, time [B, D].
        """
        c = self.config
        check_inputs(c, x, t, text, text_mask)
        grid = c.grid(x.shape)
        video = self.video_in(patchify(x, c.patch))  # [B, N, D]
        text, text_mask, turns, hidden_last = self._arranged(text, text_mask, grid)
        words = self.text_in(self.text_norm(text))  # [B, L, D]
        time = self.time(t)  # [B, D]
        condition = jax.nn.silu(time)
        if c.modulation == "shared":
            condition = self.modulation(condition)  # [B, 6 D]
        condition = per_sample(condition)
        rotations = (video_rotation(grid, c.rope_axes, c.rope_theta), turns)
        masks = [text_mask, jnp.ones((x.shape[0], video.shape[1]), bool)]
        key_mask = jnp.concatenate(masks[::-1] if hidden_last else masks, axis=1)  # [B, L + N]

        (video, _), tapped = run_stack(
            self.blocks,
            lambda block, carry: block(*carry, condition, rotations, key_mask, hidden_last),
            (video, words),
            depth=c.depth,
            taps=taps,
            remat=c.remat,
        )
        return video, [v for v, _ in tapped], time

    def _arranged(self, text, text_mask, grid):
        """The text [B, L, text_width] as the attention kernel wants its keys, once for all layers;

        its mask, its rotation, and whether hidden keys come last. Nobody sees hidden tokens and what
        becomes of the text is not returned, so that neither order nor hidden tokens behind it show.
        """
        c, (batch, length) = self.config, text.shape[:2]
        turns = text_rotation(length, grid, c.rope_axes, c.rope_theta)
        count = length + math.prod(grid)
        whole = dispatch.whole(batch, count, count, c.heads, c.head_dim, c.compute_dtype)
        if whole.lengths:
            order = fit.visible_first(text_mask)
            text, text_mask = fit.reorder(text, order), fit.reorder(text_mask, order)
            turns = per_sample(Rotation(*(x[order.order] for x in turns)))  # [B, L, head_dim / 2]
        more = whole.keys - count
        return (fit.add_tokens(text, more), fit.add_tokens(text_mask, more), longer(turns, more),
                whole.lengths)


class MMDiT(nnx.Module):
    """Velocity network v(x_t, t, c): [B, F, H, W, C] -> float32 [B, F, H, W, C_out]."""

    def __init__(self, c: MMDiTConfig, *, rngs: nnx.Rngs):
        dt = c.compute_dtype
        pt, ph, pw = c.patch
        self.config = c
        self.backbone = Backbone(c, rngs=rngs)
        self.norm_out = linear(c.width, 2 * c.width, dtype=dt, rngs=rngs, zero=True)
        self.proj_out = linear(
            c.width, c.out_channels * pt * ph * pw, dtype=dt, rngs=rngs, zero=True
        )

    def __call__(self, x, t, text, text_mask):
        """x float [B, F, H, W, C]; t float [B] in [0, 1] (1 = noise); text float [B, L, text_width];

        text_mask bool [B, L], False for padding. Returns the velocity, float32.
        ValueError when F, H, W are not multiples of the patch; AssertionError on wrong ranks.
        """
        video, _, time = self.backbone(x, t, text, text_mask)
        scale, shift = jnp.split(self.norm_out(jax.nn.silu(time))[:, None], 2, axis=-1)  # [B, 1, D]
        video = layer_norm(video) * (1 + scale) + shift
        v = unpatchify(self.proj_out(video), self.config.grid(x.shape), self.config.patch)
        return v.astype(jnp.float32)  # [B, F, H, W, C_out]
