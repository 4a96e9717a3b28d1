"""Normalisation whose sums are products on a CPU: its values, both derivatives, and where it is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.kernels.normalize import normalize, total
from apt_jax.kernels.xla import xla

CPU, H100 = Hardware("cpu", "cpu"), Hardware("gpu", "NVIDIA H100", 9.0)
EPS = 1e-3  # large enough to show where it is forgotten


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.7, 2.0, shape), jnp.float32)


def reference(x, centred):
    """In float64, as it is written in books."""
    x = np.asarray(x, np.float64)
    if centred:
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


@pytest.mark.parametrize("hardware", [CPU, H100], ids=["cpu", "gpu"])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(2, 5, 96), (3, 4, 2, 7), (6, 1), (0, 8)])
def test_values(hardware, centred, shape):
    x = draw(shape)
    with choosing(hardware=hardware):
        y = normalize(x, EPS, centred=centred)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, reference(x, centred), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_gradient_is_that_of_the_sums(centred):
    x, dy = draw((3, 5, 24)), draw((3, 5, 24), seed=1)

    def gradient(hardware):
        with choosing(hardware=hardware):
            return jax.grad(lambda x: (normalize(x, EPS, centred=centred) * dy).sum())(x)

    np.testing.assert_allclose(gradient(CPU), gradient(H100), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_second_derivative_is_that_of_the_sums(centred):
    """The exact R1 differentiates a gradient."""
    x, dy = draw((2, 3, 12)), draw((2, 3, 12), seed=1)

    def twice(hardware):
        def length(x):
            return (jax.grad(lambda x: (normalize(x, EPS, centred=centred) * dy).sum())(x) ** 2).sum()

        with choosing(hardware=hardware):
            return jax.grad(length)(x)

    np.testing.assert_allclose(twice(CPU), twice(H100), rtol=1e-3, atol=1e-5)


def reductions(run, *args):
    """The sums in the program of a gradient, before anything is optimised."""
    return str(jax.make_jaxpr(jax.grad(lambda *a: run(*a).sum()))(*args)).count("reduce_sum[")


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_sums_are_products_on_cpus_alone(centred):
    x = draw((4, 24))

    def run(x):
        return normalize(x, EPS, centred=centred) ** 2

    with choosing(hardware=CPU):
        assert reductions(run, x) == 1  # that of the loss
    with choosing(hardware=H100):
        assert reductions(run, x) > 1
        assert "custom_vjp" not in str(jax.make_jaxpr(lambda x: run(x))(x))


def test_so_are_those_of_attention():
    q, k, v = (draw((2, 9, 3, 8), seed) for seed in range(3))
    with choosing(hardware=CPU):
        assert reductions(lambda q: xla(q, k, v), q) == 1
    with choosing(hardware=H100):
        assert reductions(lambda q: xla(q, k, v), q) > 1


def test_a_total_is_kept_as_an_axis():
    x = draw((2, 3, 5))
    np.testing.assert_allclose(total(x), np.asarray(x).sum(-1, keepdims=True), rtol=1e-6)
