"""Normalisation in float32, whatever the compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels.normalize import normalize

EPS = 1e-6  # the public MMDiT's value for every norm


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without parameters; float32 inside, x's dtype out. Any [..., D]."""
    return normalize(x.astype(jnp.float32), EPS, centred=True).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis [..., dim]; float32 inside, x's dtype out."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = normalize(x.astype(jnp.float32), EPS, centred=False)
        return (h * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias over the last axis [..., dim]; float32 inside."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = layer_norm(x.astype(jnp.float32))
        return (h * self.scale[...] + self.bias[...]).astype(x.dtype)
