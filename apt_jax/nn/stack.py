"""A stack of equal blocks: one set of parameters with a leading depth axis, scanned.

Scanning compiles one block whatever the depth. Hidden states can be tapped after chosen blocks: the
scan is cut into segments there, so that nothing but the taps is kept (emitting every block's output
would store all activations).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

Carry = Any

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules with different random weights as one module; every leaf gains axis 0 = depth."""
    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def run_stack(
    blocks: nnx.Module,
    step: Callable[[nnx.Module, Carry], Carry],
    carry: Carry,
    *,
    depth: int,
    taps: Sequence[int] = (),
    remat: str = "none",
) -> tuple[Carry, list[Carry]]:
    """Apply blocks 1..depth in turn to `carry`.

    Args:
      blocks: a module made by `stack`.
      step: (one block, carry) -> carry of the same structure.
      taps: increasing 1-based block numbers after which the carry is returned.
      remat: name of a rematerialisation policy (REMAT_POLICIES).
    Returns: the last carry, and the carries tapped after each block in `taps`.
    """
    graphdef, state = nnx.split(blocks)

    def body(carry: Carry, block_state: Any) -> tuple[Carry, None]:
        return step(nnx.merge(graphdef, block_state), carry), None

    policy = REMAT_POLICIES[remat]
    if policy is not None:
        body = jax.checkpoint(body, policy=policy)
    tapped, start = [], 0
    for end in sorted({*taps, depth}):
        segment = jax.tree.map(lambda leaf: leaf[start:end], state) if (start, end) != (0, depth) else state  # noqa: B023
        carry, _ = jax.lax.scan(body, carry, segment)
        if end in taps:
            tapped.append(carry)
        start = end
    return carry, tapped
