"""The stack of blocks: a short one on a CPU is no loop, and nothing else about it differs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.nn.linear import linear
from apt_jax.nn.stack import UNROLLED, run_stack, stack

CPU, H100 = Hardware("cpu", "cpu"), Hardware("gpu", "NVIDIA H100", 9.0)
WIDTH = 6


def network(depth):
    blocks = stack(lambda r: linear(WIDTH, WIDTH, dtype=jnp.float32, rngs=r), depth, nnx.Rngs(0))
    graphdef, state = nnx.split(blocks)

    def run(state, x, *, taps=(), remat="none"):
        out, tapped = run_stack(nnx.merge(graphdef, state), lambda b, x: jnp.sin(b(x)), x, depth=depth,
                                taps=taps, remat=remat)
        return out, tapped

    return state, run, jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)), jnp.float32)


def program(hardware, depth, **options):
    state, run, x = network(depth)
    with choosing(hardware=hardware):
        step = jax.jit(jax.grad(lambda state: run(state, x, **options)[0].sum()))
        return step.lower(state).compile().as_text()


@pytest.mark.parametrize("taps", [(), (1, 3), (2, 3, 4)])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_is_the_loop(taps, remat):
    depth = 4
    state, run, x = network(depth)

    def loss(state):
        out, tapped = run(state, x, taps=taps, remat=remat)
        return (out**2).sum() + sum((i + 2) * (t**2).sum() for i, t in enumerate(tapped))

    results = []
    for hardware in (CPU, H100):
        with choosing(hardware=hardware):
            results.append(jax.value_and_grad(lambda state: loss(state))(state))
    for ours, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)


def test_only_short_stacks_on_cpus_are_unrolled():
    assert " while(" not in program(CPU, UNROLLED)
    assert " while(" in program(CPU, UNROLLED + 1)
    assert " while(" in program(H100, UNROLLED)
    with choosing(brief=True):
        assert " while(" in program(CPU, UNROLLED)


def test_what_is_computed_twice_stays_in_a_loop():
    """Without one XLA finds the second time and keeps the first, and the memory is not spared."""
    assert " while(" in program(CPU, UNROLLED, remat="full")
