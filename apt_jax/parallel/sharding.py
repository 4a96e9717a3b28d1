"""Which array lies where: one table from parameter path to mesh axes, the rest inferred.

The rules see only path and shape, so the optimiser's moments, the EMA and the gradients, whose
paths end in the parameter's own path, fall on the same devices as the parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What a rule may say besides a tuple of axis names (aligned with the last dimensions).
REPLICATE = "replicate"
INFER = "infer"

# First match wins; patterns are searched in "a/b/c" paths. Equal layers are stacked on the leading
# axis of everything under blocks/ and heads/: it is sliced layer by layer, so it is never sharded.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(^|/)(step|key|count)$", REPLICATE),
    (r"", INFER),
)
STACKED = re.compile(r"(^|/)(blocks|heads)/")

# Below this many elements the gather costs more than the memory it saves.
MIN_ELEMENTS = 2**14


def path_string(path: tuple[Any, ...]) -> str:
    """A jax key path as "a/b/c": dict keys, attribute names and indices alike."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh,
             min_elements: int = MIN_ELEMENTS) -> PartitionSpec:
    """The partition of one array.

    Args:
      path: "blocks/attn/q/kernel", whatever prefix the state puts before it.
      shape: its shape.
      mesh: gives the axis sizes.
      min_elements: arrays with fewer elements stay whole.
    """
    rule = next(axes for pattern, axes in RULES if re.search(pattern, path))
    if rule == REPLICATE:
        return PartitionSpec()
    if rule == INFER:
        return _infer(shape, 1 if STACKED.search(path) else 0, mesh, min_elements)
    return PartitionSpec(*(None,) * (len(shape) - len(rule)), *rule)


def _infer(shape: tuple[int, ...], skip: int, mesh: Mesh, min_elements: int) -> PartitionSpec:
    """The largest dimension that `fsdp` divides, the later one of equals."""
    ways = mesh.shape["fsdp"]
    if ways == 1 or math.prod(shape) < min_elements:
        return PartitionSpec()
    candidates = [d for d in range(skip, len(shape)) if shape[d] % ways == 0 and shape[d] >= ways]
    if not candidates:
        return PartitionSpec()
    best = max(candidates, key=lambda d: (shape[d], d))
    return PartitionSpec(*(None,) * best, "fsdp")


def infer_shardings(tree: Any, mesh: Mesh, min_elements: int = MIN_ELEMENTS) -> Any:
    """The tree of `NamedSharding` for a tree of arrays or `jax.ShapeDtypeStruct`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, spec_for(path_string(path), tuple(leaf.shape), mesh, min_elements)), tree)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct` leaves that carry their sharding (what a restore needs)."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree, shardings)


def init_sharded(init: Callable[..., Any], *args: Any, mesh: Mesh,
                 min_elements: int = MIN_ELEMENTS) -> tuple[Any, Any]:
    """Runs `init(*args)` jitted so that every result is born on its devices.

    Returns:
      The tree of arrays, and the tree of their shardings.
    """
    shardings = infer_shardings(jax.eval_shape(init, *args), mesh, min_elements)
    return jax.jit(init, out_shardings=shardings)(*args), shardings
