"""Parameters from a reader onto numpy or onto a mesh, layer by layer.

A leaf of 60 stacked layers is larger than the host wants to hold: a stacked leaf is made on its
devices empty, and each layer is read, sent to the devices that keep it, and written into place
there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# (layer, or None for the whole leaf) -> array
Reader = Callable[[int | None], np.ndarray]


def place(read: Reader, shape: tuple[int, ...], dtype: Any, stacked: bool,
          sharding: NamedSharding | None = None) -> Any:
    """One leaf.

    Args:
      read: gives one layer (or the leaf, if it is not stacked) as numpy, in any dtype.
      shape, dtype: of the leaf.
      stacked: axis 0 counts layers.
      sharding: where it lies; None gives a numpy array.
    """
    if sharding is None:
        out = np.empty(shape, dtype)
        for layer in range(shape[0]) if stacked else (None,):
            out[() if layer is None else layer] = read(layer)
        return out
    if not stacked or (sharding.spec and sharding.spec[0] is not None):
        # A leaf whose depth is sharded (no rule does that) is read whole.
        whole = read(None) if not stacked else np.stack([read(i) for i in range(shape[0])])
        return _scatter(whole, dtype, sharding)
    one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    leaf = _empty(shape, jnp.dtype(dtype), sharding)()
    insert = _insert(sharding)
    for layer in range(shape[0]):
        leaf = insert(leaf, _scatter(read(layer), dtype, one), layer)
        leaf.block_until_ready()  # else the queue holds many layers on the host
    return leaf


def _scatter(value: np.ndarray, dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: np.asarray(value[index], dtype))


@functools.lru_cache(256)
def _empty(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(256)
def _insert(sharding: NamedSharding) -> Callable:
    return jax.jit(
        lambda leaf, value, layer: jax.lax.dynamic_update_index_in_dim(leaf, value, layer, 0),
        donate_argnums=0, out_shardings=sharding)
