"""The dense layer's product: its gradients, and where its own derivative is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.kernels.product import dot_general
from apt_jax.kernels.scope import entered
from apt_jax.nn.linear import linear
from apt_jax.nn.stack import REMAT_POLICIES

DIMS = (((2,), (0,)), ((), ()))
H100 = Hardware("gpu", "NVIDIA H100", 9.0)


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 5, 7), (7, 4), (3, 5, 4))]


class OnMesh:
    """All of a scope that the product asks for: that there is one."""


@pytest.mark.parametrize("scope", [None, OnMesh()], ids=["one device", "on a mesh"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_are_jaxs(scope, dtype):
    x, w, dy = arrays(dtype)
    with choosing(hardware=Hardware("cpu", "cpu")), entered(scope):
        ours, pull = jax.vjp(lambda x, w: dot_general(x, w, DIMS, precision=None), x, w)
    plain, pull_plain = jax.vjp(lambda x, w: lax.dot_general(x, w, DIMS), x, w)
    np.testing.assert_array_equal(ours, plain)
    for mine, other in zip(pull(dy), pull_plain(dy), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(other, np.float32),
                                   rtol=1e-6 if dtype == jnp.float32 else 2e-2, atol=1e-6)


def test_samples_of_a_vmap_are_summed():
    """The discriminator sees real, perturbed and generated samples on an axis of their own."""
    x, w, dy = arrays()
    many = jnp.stack([x, 2 * x, -x])

    def loss(product, w):
        return (jax.vmap(lambda x: product(x, w, DIMS))(many) * dy).sum()

    ours, plain = (jax.grad(lambda w, p=p: loss(p, w))(w) for p in (dot_general, lax.dot_general))
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_layers_use_it_on_cpus_alone():
    layer, x = linear(7, 4, dtype=jnp.float32, rngs=nnx.Rngs(0)), arrays()[0]

    def program(**chosen):
        with choosing(**chosen):
            return str(jax.make_jaxpr(lambda x: layer(x))(x))  # traced anew

    assert "custom_vjp" in program()
    assert "custom_vjp" not in program(hardware=H100)


def body(product, x, w, v):
    """Two layers under the remat policy that keeps their products."""
    def layers(x, w, v):
        return product(jnp.tanh(product(x, w, DIMS)), v, DIMS)

    return jax.checkpoint(layers, policy=REMAT_POLICIES["dots"], prevent_cse=False)(x, w, v).sum()


@pytest.mark.parametrize("variables", [(0, 1, 2), (0,), (1, 2)], ids=["all", "inputs", "matrices"])
def test_nothing_is_computed_that_jax_would_not(variables):
    """Kept products are not computed again, and a frozen matrix has no gradient."""
    x, w, _ = arrays()
    v = jnp.asarray(np.random.default_rng(4).normal(size=(4, 6)), jnp.float32)

    def products(product):
        step = jax.grad(lambda *a: body(product, *a), argnums=variables)
        return str(jax.make_jaxpr(step)(x, w, v)).count("dot_general[")

    assert products(dot_general) == products(lax.dot_general)


def test_options_of_lax_are_passed_on():
    x, w, _ = arrays(jnp.bfloat16)
    assert dot_general(x, w, DIMS, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_tokens_cut_over_devices_are_not_gathered():
    """With tokens on an axis of their own, dW is summed over devices and x stays where it is."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "context"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(4, 8, n)), jnp.float32) for n in (6, 10))
    w = jnp.asarray(rng.normal(size=(6, 10)), jnp.float32)
    tokens = NamedSharding(mesh, PartitionSpec("fsdp", "context"))
    with entered(OnMesh()):
        step = jax.jit(jax.grad(lambda w, x, dy: (dot_general(x, w, DIMS) * dy).sum()))
        text = step.lower(w, jax.device_put(x, tokens), jax.device_put(dy, tokens)).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
