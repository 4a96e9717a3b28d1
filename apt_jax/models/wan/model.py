"""The Wan 2.1 transformer: self attention over video tokens, cross attention to the text.

The mathematics is that of diffusers' WanTransformer3DModel. Residuals are added, and modulation and
time embedding computed, in float32; matrix products run in the config's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels import dispatch, fit
from apt_jax.kernels.attention import attention
from apt_jax.kernels.scope import per_sample
from apt_jax.models.inputs import check_inputs
from apt_jax.models.wan.config import WanConfig
from apt_jax.nn.embeddings import TimeEmbedding, patchify, unpatchify
from apt_jax.nn.linear import MLP, linear
from apt_jax.nn.modulation import add_gated, modulate, split_modulation
from apt_jax.nn.norm import LayerNorm, RMSNorm, layer_norm
from apt_jax.nn.rope import Rotation, longer, rotate, video_rotation
from apt_jax.nn.stack import run_stack, stack

FLOAT32 = jnp.dtype(jnp.float32)


class TextIn(nnx.Module):
    """Text states [B, L, text_width] -> [B, L, D]: linear, tanh-approximated GELU, linear."""

    def __init__(self, c: WanConfig, *, rngs: nnx.Rngs):
        self.hidden = linear(c.text_width, c.width, dtype=c.compute_dtype, rngs=rngs)
        self.out = linear(c.width, c.width, dtype=c.compute_dtype, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        return self.out(jax.nn.gelu(self.hidden(text), approximate=True))


class Attention(nnx.Module):
    """Attention of tokens [B, N, D] to a context [B, M, D]; RMSNorm of q and k over all heads."""

    def __init__(self, c: WanConfig, *, rngs: nnx.Rngs):
        self.heads = c.heads
        self.q, self.k, self.v, self.out = (
            linear(c.width, c.width, dtype=c.compute_dtype, rngs=rngs) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(c.width), RMSNorm(c.width)

    def __call__(self, x: jax.Array, context: jax.Array, rotation: Rotation | None = None,
                 real: int | None = None):
        """real: how many of the context's tokens there are, with padding behind them; None: all."""
        def split(tokens):
            return tokens.reshape(*tokens.shape[:2], self.heads, -1)  # [B, N, heads, head_dim]

        q, k = split(self.q_norm(self.q(x))), split(self.k_norm(self.k(context)))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mask = None
        if real is not None and real < context.shape[1]:
            mask = jnp.broadcast_to(jnp.arange(context.shape[1]) < real, context.shape[:2])
        mixed = attention(q, k, split(self.v(context)), mask, hidden_last=mask is not None)
        return self.out(mixed.reshape(x.shape))  # [B, N, D]


class Block(nnx.Module):
    """Self attention, cross attention to the text, MLP; the first and last modulated by time."""

    def __init__(self, c: WanConfig, *, rngs: nnx.Rngs):
        self.modulation = nnx.Param(_table(6, c.width, rngs))
        self.attn = Attention(c, rngs=rngs)
        self.cross_norm = LayerNorm(c.width)
        self.cross = Attention(c, rngs=rngs)
        self.mlp = MLP(c.width, c.mlp_ratio, dtype=c.compute_dtype, rngs=rngs)

    def __call__(self, x, text, condition, rotation, real=(None, None)):
        """x [B, N, D], text [B, L, D], condition float32 [B, 6, D] -> [B, N, D] in x's dtype.

        real: how many tokens of x and of the text are no padding (`Attention`).
        """
        offsets = (condition + self.modulation[...]).reshape(x.shape[0], -1)  # [B, 6 D]
        attn, mlp = split_modulation(offsets)

        h = modulate(x, attn)
        x = add_gated(x, attn, self.attn(h, h, rotation, real[0]))
        x = x + self.cross(self.cross_norm(x), text, real=real[1])
        return add_gated(x, mlp, self.mlp(modulate(x, mlp)))


class Backbone(nnx.Module):
    """Embeddings and blocks: what generator and discriminator share."""

    def __init__(self, c: WanConfig, *, rngs: nnx.Rngs):
        pt, ph, pw = c.patch
        self.config = c
        self.patch_in = linear(
            c.in_channels * pt * ph * pw, c.width, dtype=c.compute_dtype, rngs=rngs)
        self.text_in = TextIn(c, rngs=rngs)
        self.time = TimeEmbedding(c.width, c.frequency_width, dtype=FLOAT32, rngs=rngs)
        self.modulation = linear(c.width, 6 * c.width, dtype=FLOAT32, rngs=rngs)
        self.blocks = stack(lambda r: Block(c, rngs=r), c.depth, rngs)

    def __call__(self, x, t, text, text_mask, taps: Sequence[int] = ()):
        """x [B, F, H, W, C], t [B], text [B, L, text_width], text_mask bool [B, L] ->

        visual tokens [B, N, D] after the last block, the list of those after `taps`, time [B, D].
        """
        c = self.config
        check_inputs(c, x, t, text, text_mask)
        rotation = video_rotation(c.grid(x.shape), c.rope_axes, c.rope_theta, centred=False)
        patches = patchify(x, c.patch)  # [B, N, C pt ph pw]
        text = zero_padded(text, text_mask, c.text_tokens)  # [B, 512, text_width]
        real, more = self._tokens(*patches.shape[:2], text.shape[1])
        rotation = longer(rotation, more[0])
        video = self.patch_in(fit.add_tokens(patches, more[0]))  # [B, N, D]
        words = self.text_in(fit.add_tokens(text, more[1]))  # [B, 512, D]
        time = self.time(t)  # [B, D], float32
        condition = self.modulation(jax.nn.silu(time)).reshape(-1, 6, c.width)
        condition = per_sample(condition)
        video, tapped = run_stack(
            self.blocks,
            lambda block, tokens: block(tokens, words, condition, rotation, real),
            video, depth=c.depth, taps=taps, remat=c.remat,
        )
        if more[0]:
            video, *tapped = (tokens[:, :real[0]] for tokens in (video, *tapped))
        return video, tapped, time

    def _tokens(self, batch: int, video: int, text: int):
        """((video, text), how many tokens of padding each gets): once for all layers what the

        attention kernels would add in each. As keys they are hidden, as queries cut off at the end.
        """
        sizes = self.config.heads, self.config.head_dim, self.config.compute_dtype
        tokens = dispatch.whole(batch, video, video, *sizes).keys
        words = dispatch.whole(batch, tokens, text, *sizes).keys
        return (video, text), (tokens - video, words - text)


class Wan(nnx.Module):
    """Velocity network v(x_t, t, c): [B, F, H, W, C] -> float32 [B, F, H, W, C_out]."""

    def __init__(self, c: WanConfig, *, rngs: nnx.Rngs):
        pt, ph, pw = c.patch
        self.config = c
        self.backbone = Backbone(c, rngs=rngs)
        self.norm_out = nnx.Param(_table(2, c.width, rngs))
        self.proj_out = linear(
            c.width, c.out_channels * pt * ph * pw, dtype=c.compute_dtype, rngs=rngs, zero=True)

    def __call__(self, x, t, text, text_mask):
        """x float [B, F, H, W, C]; t float [B] in [0, 1] (1 = noise); text float [B, L, D_text];

        text_mask bool [B, L], False for padding. Returns the velocity, float32.
        ValueError when F, H, W are not multiples of the patch or the text is longer than
        text_tokens; AssertionError on wrong ranks.
        """
        video, _, time = self.backbone(x, t, text, text_mask)
        shift, scale = (time[:, None] + row for row in self.norm_out[...])  # [B, 1, D]
        h = layer_norm(video.astype(FLOAT32)) * (1 + scale) + shift
        v = self.proj_out(h.astype(video.dtype))  # [B, N, C_out pt ph pw]
        return unpatchify(v, self.config.grid(x.shape), self.config.patch).astype(FLOAT32)


def zero_padded(text: jax.Array, mask: jax.Array, length: int) -> jax.Array:
    """Text states [B, L, D] with zeros where mask [B, L] is False, then zeros up to `length`.

    Wan was trained with text of 512 states, zeros behind the prompt's, and attends to all of them:
    the zeros are part of the input and are not masked. length 0 keeps L.
    """
    missing = length - text.shape[1] if length else 0
    if missing < 0:
        raise ValueError(f"text of {text.shape[1]} states is longer than text_tokens = {length}")
    text = jnp.where(mask[..., None], text, 0)
    return jnp.pad(text, ((0, 0), (0, missing), (0, 0)))  # [B, length, D]


def _table(rows: int, width: int, rngs: nnx.Rngs) -> jax.Array:
    """Learned offsets of a modulation, float32 [rows, width], as Wan starts them."""
    return jax.random.normal(rngs.params(), (rows, width), jnp.float32) * width**-0.5
