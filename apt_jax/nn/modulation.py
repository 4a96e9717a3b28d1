"""Adaptive layer norm: the time embedding sets a shift, a scale and a gate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apt_jax.nn.norm import layer_norm


class Modulation(NamedTuple):
    """shift, scale and gate, each [B, 1, D], of one residual branch."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array


def split_modulation(m: jax.Array) -> tuple[Modulation, Modulation]:
    """[B, 6 D] -> the attention branch's and the MLP branch's (shift, scale, gate), each [B, 1, D]."""
    parts = [p[:, None] for p in jnp.split(m, 6, axis=-1)]
    return Modulation(*parts[:3]), Modulation(*parts[3:])


def modulate(x: jax.Array, m: Modulation) -> jax.Array:
    """layer_norm(x) * (1 + scale) + shift, for x [B, N, D]; float32 inside, x's dtype out."""
    scale, shift = m.scale.astype(jnp.float32), m.shift.astype(jnp.float32)
    # In bfloat16 1 + scale would be 1 up to a scale of 0.002.
    return (layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift).astype(x.dtype)


def add_gated(x: jax.Array, m: Modulation, branch: jax.Array) -> jax.Array:
    """x + gate * branch, both [B, N, D]; float32 inside, x's dtype out."""
    return (x.astype(jnp.float32) + m.gate.astype(jnp.float32) * branch).astype(x.dtype)
