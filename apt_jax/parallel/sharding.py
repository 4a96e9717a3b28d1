"""Which array lies where: one table from parameter path to mesh axes, the rest inferred.

The table says what the tensor axis cuts; over fsdp and context together the largest dimension left
is cut. The compiler places the collectives (the axes are Auto).

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

from apt_jax.parallel.mesh import SHARD_AXES

# What a rule may say: replicate it; infer all; or the dimension, counted from the end, that the
# tensor axis cuts (the rest is inferred). COLUMNS cut a layer's outputs, ROWS its inputs, so that
# a layer pair (qkv, out) or (up, down) needs one sum over the tensor axis, at its end.
REPLICATE, INFER = "replicate", "infer"
COLUMNS, ROWS = -1, -2

# First match wins; patterns are searched in "a/b/c" paths, within the stacked layers of each model
# family. Equal layers are stacked on the leading axis of everything under blocks/ and heads/: it is
# sliced layer by layer, so it is never sharded.
STATE_RULES = (
    (r"(^|/)(step|key|count)$", REPLICATE),
)
MMDIT_RULES = (
    (r"/blocks/(video|text)/(qkv|mlp/up)/(kernel|bias)$", COLUMNS),
    (r"/blocks/(video|text)/(out|mlp/down)/kernel$", ROWS),
)
WAN_RULES = (
    (r"/blocks/(attn|cross)/(q|k|v|qkv|kv)/(kernel|bias)$", COLUMNS),
    (r"/blocks/(attn|cross)/out/kernel$", ROWS),
    (r"/blocks/mlp/up/(kernel|bias)$", COLUMNS),
    (r"/blocks/mlp/down/kernel$", ROWS),
)
HEAD_RULES = (
    (r"/heads/(q|kv|mlp/up)/(kernel|bias)$", COLUMNS),
    (r"/heads/(out|mlp/down)/kernel$", ROWS),
)
# What is served in eight bits lies turned around, [d_out, d_in] (nn/fp8.py).
FP8_RULES = (
    (r"/blocks/.*/(q|k|v|qkv|up)/kernel_fp8$", ROWS),
    (r"/blocks/.*/(q|k|v|qkv|up)/kernel_scale$", COLUMNS),
    (r"/blocks/.*/(out|down)/kernel_fp8$", COLUMNS),
)
RULES: tuple[tuple[str, Any], ...] = (
    *STATE_RULES, *FP8_RULES, *MMDIT_RULES, *WAN_RULES, *HEAD_RULES, (r"", INFER))
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
    rule = next(axes for pattern, axes in RULES if re.search(pattern, "/" + path))
    if rule == REPLICATE:
        return PartitionSpec()
    axes: list[Any] = [None] * len(shape)
    if rule != INFER and mesh.shape["tensor"] > 1 and shape[rule] % mesh.shape["tensor"] == 0:
        axes[rule] = "tensor"
    _infer(axes, shape, 1 if STACKED.search(path) else 0, mesh, min_elements)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def layer_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one layer's slice of a stacked parameter: `spec_for` without the depth axis.

    Args:
      path: within the block, "video/qkv/kernel".
      shape: of the slice, [d_in, d_out].
    """
    # The size threshold counts all layers; a slice alone cannot know, and small ones travel cheaply.
    spec = spec_for(f"blocks/{path}", (1, *shape), mesh, min_elements=0)
    return PartitionSpec(*spec[1:])


def _infer(axes: list[Any], shape: tuple[int, ...], skip: int, mesh: Mesh,
           min_elements: int) -> None:
    """Cuts the largest free dimension that `SHARD_AXES` divide, the later one of equals.

    Where all of them together divide no dimension, the larger one alone may.
    """
    if math.prod(shape) < min_elements:
        return
    present = [a for a in SHARD_AXES if mesh.shape[a] > 1]
    alone = sorted(present, key=lambda a: -mesh.shape[a])
    for names in dict.fromkeys([tuple(present), *((a,) for a in alone)]):
        ways = math.prod(mesh.shape[a] for a in names)
        free = [d for d in range(skip, len(shape))
                if axes[d] is None and shape[d] % ways == 0 and shape[d] >= ways]
        if names and free:
            best = max(free, key=lambda d: (shape[d], d))
            axes[best] = names if len(names) > 1 else names[0]
            return


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
