"""Plain attention that keeps its log-sum-exp: values, both derivatives, and what is computed again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import attention64

from apt_jax.kernels import dispatch
from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.kernels.oracle import oracle
from apt_jax.kernels.xla import xla
from apt_jax.nn.stack import REMAT_POLICIES

SHAPES = {"one query": (2, 1, 7, 2, 4), "joint": (3, 37, 37, 3, 8), "cross": (2, 5, 11, 3, 64)}


def drawn(name, dtype=jnp.float32):
    """q, k, v, a mask with a whole row hidden, and what comes back."""
    b, n, m, h, d = SHAPES[name]
    rng = np.random.default_rng(7)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(b, length, h, d)), dtype)
                     for length in (n, m, m, n))
    mask = rng.random((b, m)) > 0.4
    mask[-1] = False  # a sample without a key
    return q, k, v, jnp.asarray(mask), dout


def gradients(attention, q, k, v, mask, dout):
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    return (out, *pull(dout))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradient_equal_float64(name, masked):
    q, k, v, mask, dout = drawn(name)
    mask = mask if masked else None
    out, _, grads = attention64(q, k, v, mask, dout)
    for ours, exact in zip(gradients(xla, q, k, v, mask, dout), (out, *grads), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_bfloat16_is_as_near_to_float64_as_the_oracle(dim):
    rng = np.random.default_rng(1)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(2, 48, 2, dim)), jnp.bfloat16) for _ in range(4))
    mask = jnp.asarray(rng.random((2, 48)) > 0.3)
    out, _, grads = attention64(q, k, v, mask, dout)

    def distances(attention):
        return [np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)
                for ours, exact in zip(gradients(attention, q, k, v, mask, dout), (out, *grads),
                                       strict=True)]

    ours, plain = distances(xla), distances(oracle)
    assert max(ours) < 1e-2
    for mine, other in zip(ours, plain, strict=True):
        assert mine < 1.5 * other


def test_second_derivative_equals_the_oracles():
    q, k, v, mask, dout = drawn("joint")

    def penalty(attention, q):  # the gradient's square, as the exact R1 has it
        return (jax.grad(lambda q: (attention(q, k, v, mask) * dout).sum())(q) ** 2).sum()

    ours, plain = (jax.grad(lambda q, a=a: penalty(a, q))(q) for a in (xla, oracle))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_what_dots_keeps_spares_the_softmax():
    """Under the remat policy "dots" the backward pass looks for no maximum and no sum again."""
    q, k, v, mask, dout = drawn("joint")

    def program(attention):
        body = jax.checkpoint(lambda q: attention(q, k, v, mask), policy=REMAT_POLICIES["dots"])
        return str(jax.make_jaxpr(jax.grad(lambda q: (body(q) * dout).sum()))(q))

    assert program(oracle).count("reduce_max") == 2
    assert program(xla).count("reduce_max") == 1


def test_a_cpu_takes_it_where_one_derivative_is_asked_for():
    q, k, v, mask, _ = drawn("joint")

    def uses_it(**chosen):
        with choosing(**chosen):
            return "custom_vjp" in str(jax.make_jaxpr(
                lambda q, k, v: dispatch.run(q, k, v, mask))(q, k, v))

    assert uses_it() and uses_it(backend="xla") and uses_it(backend="xla", derivatives=2)
    assert not uses_it(backend="oracle") and not uses_it(derivatives=2)
    assert not uses_it(hardware=Hardware("gpu", "NVIDIA H100", 9.0))
