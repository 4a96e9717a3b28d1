"""A checkpoint whose learning rate was constant, for a run in which it changes; and the other way.

optax counts the updates of a rate that is a schedule, and of a constant one it does not: the states of
the optimisers differ by these counts. A run may go on with another rate (`train/course.py` warns), so
they are left out, or set to the checkpoint's step, which is where the new schedule goes on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.parallel.sharding import path_string
from apt_jax.train.course import saved_field
from apt_jax.train.optimizers import discriminator_optimizer, generator_optimizer, is_constant

OPTIMIZERS = {"generator": generator_optimizer, "discriminator": discriminator_optimizer}
SCHEDULE = ("warmup_steps", "final_rate")


def _leaves(tree: Any) -> dict[str, Any]:
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def as_saved(abstract: dict[str, Any], config: Any, saved: Any) -> dict[str, Any]:
    """`abstract`, the sharded state of a run of `config`, as one of the config `saved` has it.

    saved differs from config in nothing that makes another run of it, and may be older than fields.
    """
    there = config.copy_and_resolve_references()
    for name in SCHEDULE:
        there.optimizer[name] = saved_field(saved, f"optimizer.{name}")
    if is_constant(there) == is_constant(config):
        return abstract
    out = dict(abstract)
    for name, make in OPTIMIZERS.items():
        key = f"{name}_opt"
        if key not in abstract:
            continue
        today = _leaves(abstract[key])
        out[key] = jax.tree_util.tree_map_with_path(
            lambda path, leaf, today=today: today.get(path_string(path), jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=abstract["step"].sharding)),
            jax.eval_shape(make(there).init, abstract[name]))
    return out


def as_today(state: dict[str, Any], abstract: dict[str, Any]) -> dict[str, Any]:
    """`state`, restored like `as_saved` of `abstract`, in the tree of `abstract`."""
    there = _leaves(state)

    def leaf(path, _):
        name = path_string(path)
        if name not in there and name.endswith("count"):
            return jnp.copy(state["step"])  # a copy: one buffer cannot be donated twice
        return there[name]

    return jax.tree_util.tree_map_with_path(leaf, abstract)
