"""The encoder of UMT5 (arXiv 2304.09151), Wan's text encoder: 24 layers of 4096 channels for XXL.

A T5 encoder with gated GELU whose every layer has its own table of relative positions; the
mathematics is that of transformers' UMT5EncoderModel. T5 does not scale attention scores. The
residual stream stays in float32, whatever the compute dtype: XXL's is too large for bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.errors import UserError
from apt_jax.models.fields import check_fields
from apt_jax.nn.functional import Network
from apt_jax.nn.norm import RMSNorm
from apt_jax.nn.stack import run_stack, stack


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes; the defaults are UMT5-XXL's encoder, 5,680,910,336 parameters."""

    vocabulary: int = 256_384
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10_240
    buckets: int = 32
    max_distance: int = 128
    dtype: str = "float32"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def umt5_config(fields: Mapping[str, Any], **changes: Any) -> UMT5Config:
    """UMT5Config from a dict of its fields, e.g. "umt5" of a component's config.json.

    UserError for a field that it does not have, or a value of another kind.
    """
    known = {f.name for f in dataclasses.fields(UMT5Config)}
    for name in fields:
        if name not in known:
            raise UserError(f"the text encoder's config has an unknown field {name!r}; import the "
                            "checkpoint again")
    check_fields("the text encoder's config", fields, UMT5Config)
    return UMT5Config(**{**fields, **changes})


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """int32 [length, length]: the row of the table for (query, key), by key's distance from query.

    Half of the rows are for keys behind the query. Of each half, the first half counts single steps
    and the rest grows logarithmically up to max_distance, where it stays.
    """
    half = buckets // 2
    exact = half // 2
    distance = np.arange(length)[None] - np.arange(length)[:, None]  # [query, key]
    size = np.abs(distance)
    # float32 as the reference, whose truncation falls on exact powers of two
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (np.where(size < exact, size, far) + half * (distance > 0)).astype(np.int32)


def _linear(d_in: int, d_out: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


class Block(nnx.Module):
    """Pre-norm self attention with a bias by relative position, and gated MLP."""

    def __init__(self, c: UMT5Config, *, rngs: nnx.Rngs):
        dt, inner = c.compute_dtype, c.heads * c.head_dim
        self.heads, self.dtype = c.heads, dt
        self.attn_norm = RMSNorm(c.width)
        self.q, self.k, self.v = (_linear(c.width, inner, dt, rngs) for _ in range(3))
        self.out = _linear(inner, c.width, dt, rngs)
        self.positions = nnx.Param(
            0.1 * jax.random.normal(rngs.params(), (c.buckets, c.heads), jnp.float32))
        self.mlp_norm = RMSNorm(c.width)
        self.gate, self.up = (_linear(c.width, c.mlp_width, dt, rngs) for _ in range(2))
        self.down = _linear(c.mlp_width, c.width, dt, rngs)

    def __call__(self, x: jax.Array, rows: jax.Array, mask: jax.Array) -> jax.Array:
        """x float32 [B, L, D], rows int32 [L, L], mask bool [B, L] -> float32 [B, L, D]."""
        h = self.attn_norm(x).astype(self.dtype)
        q, k, v = (p(h).reshape(*h.shape[:2], self.heads, -1) for p in (self.q, self.k, self.v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        scores = scores + self.positions[...][rows].astype(jnp.float32).transpose(2, 0, 1)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)  # [B, heads, L, L]
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + self.out(mixed.reshape(*h.shape[:2], -1))

        h = self.mlp_norm(x).astype(self.dtype)
        h = jax.nn.gelu(self.gate(h), approximate=True) * self.up(h)  # [B, L, mlp_width]
        return x + self.down(h)


class UMT5(nnx.Module):
    """Token ids -> states."""

    def __init__(self, c: UMT5Config, *, rngs: nnx.Rngs):
        self.config = c
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), (c.vocabulary, c.width), jnp.float32))
        self.blocks = stack(lambda r: Block(c, rngs=r), c.depth, rngs)
        self.norm = RMSNorm(c.width)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids int32 [B, L], mask bool [B, L] (False for padding, at least one True a row) ->

        float32 [B, L, D]; states of padding mean nothing. The padded length changes no state.
        """
        c = self.config
        rows = jnp.asarray(relative_buckets(ids.shape[1], c.buckets, c.max_distance))
        x = self.embedding[...][ids].astype(jnp.float32)  # [B, L, D]
        x, _ = run_stack(self.blocks, lambda block, x: block(x, rows, mask), x, depth=c.depth)
        return self.norm(x)


def make_umt5(config: UMT5Config) -> Network:
    """encode(params, ids, mask) -> states; parameters in bfloat16 work as well as in float32."""
    return Network.build(lambda rngs: UMT5(config, rngs=rngs))
