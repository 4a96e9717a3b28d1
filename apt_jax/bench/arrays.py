"""Random arrays for abstract ones, as they lie in a trained network.

Hardware is faster on numbers of little entropy: with norms' scales near zero every score of attention
is equal, and weights of 0.02 in eight bits are zeros and subnormal numbers for the larger half.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.nn.fp8 import KERNEL, SCALE

# An array's kind is that of the last name on its path. What has none, or another, is an input.
_KINDS = {"kernel": "weights", "embedding": "weights", "bias": "weights", "modulation": "weights",
          "positions": "weights", "query": "weights", "scale": "norm", KERNEL: "eight bits",
          SCALE: "scale", "loss_mask": "ones"}
STD = 0.02  # of weights
WIDEST = 4.5  # standard deviations, the largest of some thousand normal numbers; the end of eight bits


def random_like(args: Any, seed: int = 0) -> Any:
    """Random arrays for a tree of abstract ones, each on its sharding.

    Weights are normal with a deviation of 0.02, scales of norms 1 more, weights in eight bits fill
    their range and their scales give them the deviation of the others, moments of optimisers are
    positive, inputs normal with a deviation of 1, rotations cosines and sines, integers 1 + seed,
    booleans true.
    """
    def fill(path: Any, leaf: Any) -> jax.Array:
        key = jax.random.key(leaf.size % 1009 + 1009 * seed)
        return _filler(leaf.shape, leaf.dtype, leaf.sharding, _kind(path, leaf))(key, seed)

    return jax.tree_util.tree_map_with_path(fill, args)


def _kind(path: Any, leaf: Any) -> str:
    if "_opt" in jax.tree_util.keystr(path):
        return "moment"
    if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.dtype(leaf.dtype).itemsize == 1:
        return "eight bits"
    name = path[-1] if path else None
    if isinstance(name, jax.tree_util.GetAttrKey) and name.name in ("cos", "sin"):
        return name.name
    return _KINDS.get(getattr(name, "key", None), "input")


@functools.lru_cache(maxsize=1024)
def _filler(shape: tuple[int, ...], dtype: Any, sharding: Any, kind: str) -> Any:
    """One program for all leaves of a shape: a training state has hundreds, of a few shapes."""
    def make(key: jax.Array, seed: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.full(shape, 1 + seed, dtype)
        if kind == "ones":
            return jnp.ones(shape, dtype)
        largest = float(jnp.finfo(dtype).max)
        if kind == "scale":
            return jnp.full(shape, STD * WIDEST / float(jnp.finfo(jnp.float8_e4m3fn).max), dtype)
        if kind in ("cos", "sin"):
            angle = jax.random.uniform(key, shape, jnp.float32, 0, 2 * jnp.pi)
            return getattr(jnp, kind)(angle).astype(dtype)
        x = jax.random.normal(key, shape, jnp.float32)
        x = {"weights": lambda: STD * x, "norm": lambda: 1 + STD * x,
             "eight bits": lambda: jnp.clip(largest / WIDEST * x, -largest, largest),
             "moment": lambda: jnp.abs(STD * x), "input": lambda: x}[kind]()
        return x.astype(dtype)

    return jax.jit(make, out_shardings=sharding)
