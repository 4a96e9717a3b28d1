"""A stack of equal blocks: one set of parameters with a leading depth axis, scanned.

Scanning compiles one block whatever the depth, and gathers sharded parameters one layer at a time;
a few blocks on a CPU are unrolled (`UNROLLED`). Hidden states can be tapped after chosen blocks: the
scan is cut into segments there, so that nothing but the taps is kept (emitting every block's output
would store all activations).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from apt_jax.kernels import choice, scope
from apt_jax.nn.fp8 import parts

Carry = Any

# On a CPU a stack as short as this is one block behind the other, not a loop: what a loop keeps for the
# backward pass is copied in and out of it, and those kernels are as much to compile as the blocks
# that it spares (docs/benches.md). With rematerialisation it stays a loop: XLA:CPU would find what is
# computed twice and undo it.
UNROLLED = 4

# What the backward pass keeps of every block, by the names that blocks and kernels give their
# values: "block_in" is a block's input, two come from attention, and "exchanged" is what devices
# traded for it (parallel/context.py).
ATTENTION = ("attention_out", "attention_lse")
_policies = jax.checkpoint_policies

REMAT_POLICIES: dict[str, Callable | None] = {
    # Everything: fastest, and all of it in memory.
    "none": None,
    # Its input alone; the block is computed twice.
    "full": _policies.nothing_saveable,
    # Its input, the results of its layers' matrix products and what attention returned.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(*ATTENTION)),
    # Its input and what attention returned: its costliest part is not computed twice.
    "attention": _policies.save_only_these_names(*ATTENTION),
    # The same and what context parallelism exchanged for it: nothing travels twice.
    "exchange": _policies.save_only_these_names("exchanged", *ATTENTION),
    # As attention, on the host: the device keeps nothing.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_in", *ATTENTION],
        offload_src="device", offload_dst="pinned_host"),
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
    mesh = scope.current()
    place = gather = lambda tree: tree
    if mesh is not None:
        place, gather = mesh.tokens, mesh.layer

    policy, tapped = REMAT_POLICIES[remat], []
    unroll = (policy is None and depth <= UNROLLED and not choice.current().brief
              and choice.hardware().platform == "cpu")
    for first, last, graphdef, state in parts(blocks, depth):
        def body(carry: Carry, block_state: Any, graphdef: Any = graphdef) -> tuple[Carry, None]:
            carry = jax.tree.map(lambda x: checkpoint_name(x, "block_in"), place(carry))
            return place(step(nnx.merge(graphdef, gather(block_state)), carry)), None

        if policy is not None:
            # Within a loop nothing needs the barriers against common subexpressions, and they keep
            # the backward loop from gathering its next layer ahead.
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        start = first
        for end in sorted({*(tap for tap in taps if first < tap <= last), last}):
            segment = state
            if (start, end) != (first, last):
                piece = slice(start - first, end - first)
                segment = jax.tree.map(lambda leaf: leaf[piece], state)  # noqa: B023
            carry, _ = jax.lax.scan(body, carry, segment, unroll=unroll)
            if end in taps:
                tapped.append(carry)
            start = end
    return carry, tapped
