"""Tensors through a plan, one layer at a time: into our files, onto a mesh, and back.

Nothing here knows a model; memory holds the parts of one layer of one leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.convert.table import Leaf, Plan
from apt_jax.errors import UserError
from apt_jax.parallel.place import place
from apt_jax.tensor_files import DTYPES, NAMES, Spec, TensorSet

# (leaf name, layer or None) -> array: how a plan's leaves are read for the way back
LayerReader = Callable[[str, int | None], np.ndarray]
DEFAULT = ""  # the key of the most frequent dtype in a record of dtypes


def check_source(plan: Plan, tensors: TensorSet, source: str) -> None:
    """Names, shapes, dtypes and tied copies of a checkpoint; UserError naming the first wrong."""
    plan.check(tensors.shapes(), source)
    for name, tensor in tensors.tensors.items():
        if NAMES[tensor.dtype] not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{source}: tensor {name} is {NAMES[tensor.dtype]}; only unquantised "
                            "floating-point weights can be converted")
    for alias, name in plan.aliases.items():
        if alias in tensors.tensors and not _equal(tensors, alias, name):
            raise UserError(f"{source}: {alias} and {name} are tied in this model, but differ; "
                            "the checkpoint is not of this model")


def _equal(tensors: TensorSet, a: str, b: str) -> bool:
    first, second = tensors.tensors[a], tensors.tensors[b]
    return first.dtype == second.dtype and all(
        tensors.read(a, row).tobytes() == tensors.read(b, row).tobytes()
        for row in range(0, first.shape[0], max(1, first.shape[0] // 64)))


def record_dtypes(tensors: TensorSet) -> dict[str, str]:
    """{"": the most frequent dtype, name: dtype of every tensor with another}: for the way back."""
    kinds = {name: NAMES[tensor.dtype] for name, tensor in tensors.tensors.items()}
    count = list(kinds.values())
    usual = max(sorted(set(count)), key=count.count)
    return {DEFAULT: usual} | {name: kind for name, kind in kinds.items() if kind != usual}


def leaf_dtype(leaf: Leaf, tensors: TensorSet) -> np.dtype:
    """The dtype that holds every part of a leaf exactly."""
    kinds = {tensors.tensors[name].dtype for row in leaf.parts for name in row}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if DTYPES["F64"] in kinds else np.float32)


def read_layer(plan: Plan, tensors: TensorSet, leaf: str, layer: int | None) -> np.ndarray:
    """One layer of one of our leaves out of their tensors, in its own dtype."""
    entry = plan.leaves[leaf]
    parts = [tensors.read(name) for name in entry.parts[layer or 0]]
    kinds = {part.dtype for part in parts}
    if len(kinds) > 1:
        wide = leaf_dtype(entry, tensors)
        parts = [part.astype(wide) for part in parts]
    return entry.join(parts)


def our_specs(plan: Plan, tensors: TensorSet) -> list[Spec]:
    """What an import writes, in its order."""
    return [Spec(name, leaf_dtype(plan.leaves[name], tensors), plan.leaves[name].shape)
            for name in sorted(plan.leaves)]


def our_chunks(plan: Plan, tensors: TensorSet) -> Iterator[np.ndarray]:
    """The data of `our_specs`, layer by layer."""
    for spec in our_specs(plan, tensors):
        for layer in range(spec.shape[0]) if plan.leaves[spec.name].stacked else (None,):
            yield read_layer(plan, tensors, spec.name, layer).astype(spec.dtype, copy=False)


def load_tree(plan: Plan, tensors: TensorSet, dtype: Any = np.float32,
              shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Their checkpoint as our flat parameters {"a/b": array}, on `shardings` or as numpy."""
    return {
        name: place(lambda layer, name=name: read_layer(plan, tensors, name, layer), leaf.shape,
                    dtype, leaf.stacked, shardings[name] if shardings else None)
        for name, leaf in plan.leaves.items()}


def their_specs(plan: Plan, dtypes: Mapping[str, str]) -> list[Spec]:
    """What an export writes, in its order: leaf by leaf, layer by layer."""
    return [Spec(name, DTYPES[dtypes.get(name, dtypes[DEFAULT])], leaf.their_shape)
            for leaf in plan.leaves.values() for row in leaf.parts for name in row]


def their_chunks(plan: Plan, dtypes: Mapping[str, str], read: LayerReader
                 ) -> Iterator[np.ndarray]:
    """The data of `their_specs` out of our leaves; UserError for numbers a dtype cannot hold."""
    specs = iter(their_specs(plan, dtypes))
    for leaf in plan.leaves.values():
        for layer in range(leaf.shape[0]) if leaf.stacked else (None,):
            for part in leaf.split(read(leaf.name, layer)):
                spec = next(specs)
                yield narrow(part, spec.dtype, spec.name)


def narrow(value: np.ndarray, dtype: np.dtype, name: str,
           mend: str = "use --dtype bfloat16 or float32") -> np.ndarray:
    """`value` in `dtype`; UserError where a finite number lies beyond its range.

    float16 ends at 65,504: an infinity there would make every sample NaN.
    """
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    lost = ~np.isfinite(cast)
    if lost.any() and (lost := lost & np.isfinite(value)).any():
        most = np.abs(value[lost].astype(np.float64)).max()
        raise UserError(f"{name} has {lost.sum()} values beyond the range of {cast.dtype} (up to "
                        f"{most:.3g}); {mend}")
    return cast


def reader_of_leaves(leaves: Any, plan: Plan) -> LayerReader:
    """What `weights.open_generator` gives, or a `TensorSet` of our files, as a `LayerReader`."""
    return lambda name, layer: leaves.read(name, layer if plan.leaves[name].stacked else None)


def check_leaves(plan: Plan, shapes: Mapping[str, tuple[int, ...]], source: Path | str) -> None:
    """UserError where parameters of ours do not fit the plan."""
    want = {name: leaf.shape for name, leaf in plan.leaves.items()}
    for name in sorted(set(want) | set(shapes)):
        if want.get(name) != (tuple(shapes[name]) if name in shapes else None):
            raise UserError(f"{source}: parameter {name} is {shapes.get(name, 'missing')}, the "
                            f"model makes it {want.get(name, 'nothing')}; export it again")
