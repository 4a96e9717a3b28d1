"""The discriminator: the diffusion backbone with cross-attention heads and one logit (Sec. 3.3, Fig. 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels.attention import attention
from apt_jax.models.mmdit import Backbone
from apt_jax.nn.functional import Network, Params
from apt_jax.nn.linear import MLP, linear
from apt_jax.nn.norm import LayerNorm, RMSNorm
from apt_jax.nn.stack import stack


def default_taps(depth: int) -> tuple[int, ...]:
    """Blocks 16, 26 and 36 of 36, or those at the same fractions of another depth (1-based)."""
    return tuple(sorted({max(1, round(depth * n / 36)) for n in (16, 26, 36)}))


class Head(nnx.Module):
    """Cross-attention-only block: one learned query looks at all visual tokens [B, N, D] -> [B, D]."""

    def __init__(self, c: Any, heads: int, *, rngs: nnx.Rngs):
        dt = c.compute_dtype
        self.heads = heads
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.width,), jnp.float32))
        self.norm = RMSNorm(c.width)
        self.q = linear(c.width, c.width, dtype=dt, rngs=rngs)
        self.kv = linear(c.width, 2 * c.width, dtype=dt, rngs=rngs)
        self.q_norm = RMSNorm(c.width // heads)
        self.k_norm = RMSNorm(c.width // heads)
        self.out = linear(c.width, c.width, dtype=dt, rngs=rngs)
        self.mlp_norm = RMSNorm(c.width)
        self.mlp = MLP(c.width, c.mlp_ratio, dtype=dt, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        b, n, d = tokens.shape
        token = self.query[...].astype(tokens.dtype)[None, None]  # [1, 1, D]
        # One query for all samples, projected once: its matrix's gradient has no sum over samples.
        q = self.q_norm(self.q(token).reshape(1, 1, self.heads, -1))
        q = jnp.broadcast_to(q, (b, *q.shape[1:]))
        k, v = jnp.split(self.kv(self.norm(tokens)).reshape(b, n, 2 * self.heads, -1), 2, axis=2)
        token = token + self.out(attention(q, self.k_norm(k), v).reshape(b, 1, d))
        token = token + self.mlp(self.mlp_norm(token))
        return token[:, 0]  # [B, D]


class Discriminator(nnx.Module):
    """D(x, t, c) -> one float32 logit per sample [B].

    The backbone ends at the last tap; what lies beyond it in the diffusion model has no part here.
    """

    def __init__(self, c: Any, taps: tuple[int, ...], heads: int, *,
                 backbone: Callable[..., nnx.Module] = Backbone, rngs: nnx.Rngs):
        """c: the config of `backbone` (any family's), whose depth is the last tap."""
        self.taps = taps
        self.backbone = backbone(c, rngs=rngs)
        self.heads = stack(lambda r: Head(c, heads, rngs=r), len(taps), rngs)
        self.logit_norm = LayerNorm(len(taps) * c.width)
        self.logit = linear(len(taps) * c.width, 1, dtype=jnp.dtype(jnp.float32), rngs=rngs)

    def __call__(self, x, t, text, text_mask) -> jax.Array:
        """x: a clean sample, real or generated, float [B, F, H, W, C] (Eq. 6: never noised).

        t: float [B] in [0, 1], condition only; text, text_mask as for the generator.
        Returns float32 [B].
        """
        _, tapped, _ = self.backbone(x, t, text, text_mask, taps=self.taps)
        graphdef, state = nnx.split(self.heads)
        tokens = [
            nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))(hidden)  # noqa: B023
            for i, hidden in enumerate(tapped)
        ]  # each [B, D]
        joined = jnp.concatenate(tokens, axis=-1).astype(jnp.float32)
        return self.logit(self.logit_norm(joined))[:, 0]


def discriminator_from_diffusion(diffusion: Params, net: Network, key: jax.Array) -> Params:
    """D's starting weights: the backbone of the original diffusion weights, heads and logit new.

    Args:
      diffusion: parameters of the generator's network (not the distilled ones, Sec. 3.3).
      net: the discriminator's Network; its depth may be smaller (last tap before the last block).
      key: random key of the new parts.
    """
    params = dict(net.init(key))

    def take(new: jax.Array, old: jax.Array) -> jax.Array:
        if new.shape[1:] != old.shape[1:] or new.shape[0] > old.shape[0]:
            raise ValueError(f"discriminator leaf {new.shape} cannot start from {old.shape}")
        return jnp.asarray(old[: new.shape[0]], new.dtype)

    # Only the stacked blocks can be cut; elsewhere the shapes are equal and the cut is the identity.
    params["backbone"] = jax.tree.map(take, params["backbone"], diffusion["backbone"])
    return params
