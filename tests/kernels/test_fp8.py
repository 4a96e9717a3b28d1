"""Eight-bit products against a reference in numpy: the same rounding, summed in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from apt_jax.kernels import fp8
from apt_jax.kernels.choice import Hardware, choosing

H100 = Hardware("gpu", "NVIDIA H100 80GB HBM3", 9.0)


def arrays(*shapes, seed=0):
    """Rows and columns of very different sizes, as activations have them."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(s) * np.exp(rng.standard_normal((*s[:-1], 1)))
             * np.exp(rng.standard_normal(s[-1:]))).astype(np.float32) for s in shapes]


def rounded(x, axis, dtype=ml_dtypes.float8_e4m3fn):
    """What x becomes in eight bits, values times scale, float64."""
    limit = np.float32(ml_dtypes.finfo(dtype).max)
    scale = np.abs(x).max(axis=axis, keepdims=True) / limit
    values = np.clip(x / scale, -limit, limit).astype(dtype)
    return values.astype(np.float64) * scale


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_every_slice_fills_the_format_and_zeros_stay_zeros():
    (x,) = arrays((7, 33))
    x[3] = 0.0
    for dtype in (fp8.E4M3, fp8.E5M2):
        found = fp8.quantise(jnp.asarray(x), -1, dtype)
        values = np.asarray(found.values, np.float32)
        assert found.values.dtype == dtype and found.scale.shape == (7, 1)
        assert np.isfinite(values).all() and (values[3] == 0).all()
        rest = np.arange(7) != 3
        assert (np.abs(values[rest]).max(axis=1) == float(jnp.finfo(dtype).max)).all()
        assert distance(values * found.scale, x) < (0.04 if dtype == fp8.E4M3 else 0.08)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_is_not_hidden(bad):
    (x,) = arrays((4, 8))
    x[1, 2] = bad
    y = fp8.matmul(jnp.asarray(x), jnp.eye(8))
    assert np.isnan(y[1]).any() and np.isfinite(np.delete(y, 1, axis=0)).all()


def test_tiny_and_huge_rows_are_held():
    x = jnp.asarray([[1e-38, 2e-38], [1e-44, 0.0], [3e38, -1e38]], jnp.float32)
    found = fp8.quantise(x, -1)
    assert np.isfinite(np.asarray(found.values, np.float32)).all()
    np.testing.assert_allclose(found.values[2].astype(jnp.float32) * found.scale[2], x[2], rtol=0.07)


@pytest.mark.parametrize("shape, outputs", [((2, 5, 48), 32), ((3, 17), 1), ((1, 1, 16), 40)])
def test_forward_and_gradients_are_those_of_the_rounded_arrays(shape, outputs):
    x, w, g = arrays(shape, (shape[-1], outputs), (*shape[:-1], outputs))
    y, back = jax.vjp(fp8.matmul, jnp.asarray(x), jnp.asarray(w))
    dx, dw = back(jnp.asarray(g))

    flat, g = x.reshape(-1, shape[-1]), g.reshape(-1, outputs)
    xr, wr = rounded(flat, 1), rounded(w, 0)
    x_scale = (np.abs(flat).max(axis=1, keepdims=True) / np.float32(448)).astype(np.float32)
    w_scale = (np.abs(w).max(axis=0, keepdims=True) / np.float32(448)).astype(np.float32)
    to_x = rounded(g * w_scale, 1, ml_dtypes.float8_e5m2)
    to_w = rounded(g * x_scale, 0, ml_dtypes.float8_e5m2)
    assert distance(y.reshape(-1, outputs), xr @ wr) < 1e-6
    assert distance(dx.reshape(flat.shape), to_x @ (wr / w_scale).T) < 1e-6
    assert distance(dw, (xr / x_scale).T @ to_w) < 1e-6
    assert y.shape == (*shape[:-1], outputs) and dx.shape == shape and dw.shape == w.shape


def test_how_far_eight_bits_are_from_none():
    """Rounding alone: 3.7% forward; in gradients two bits of mantissa on one side, 5.9%."""
    x, w, g = arrays((64, 256), (256, 128), (64, 128))
    y, back = jax.vjp(fp8.matmul, jnp.asarray(x), jnp.asarray(w))
    dx, dw = back(jnp.asarray(g))
    assert 0.02 < distance(y, x @ w) < 0.045
    assert 0.03 < distance(dx, g @ w.T) < 0.07
    assert 0.03 < distance(dw, x.T @ g) < 0.07


def test_stored_weights_give_the_same_bits_and_bfloat16_stays():
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in arrays((3, 4, 32), (32, 24)))
    y = fp8.matmul(x, w)
    assert y.dtype == jnp.bfloat16 and y.shape == (3, 4, 24)
    assert (y == fp8.matmul_quantised(x, fp8.quantise(w.T, 1))).all()
    dx, dw = jax.grad(lambda x, w: fp8.matmul(x, w).astype(jnp.float32).sum(), (0, 1))(x, w)
    assert dx.dtype == dw.dtype == jnp.bfloat16


def factors(jaxpr) -> list[tuple[str, str]]:
    """The dtypes of both factors of every product."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(str(v.aval.dtype) for v in equation.invars))
        for inner in jax.tree.leaves(list(equation.params.values()),
                                     is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found += factors(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("hardware, dtypes", [
    (H100, ("float8_e4m3fn", "float8_e5m2")), (Hardware("gpu", "A100", 8.0), ("bfloat16",) * 2),
    (Hardware("tpu", "TPU v5"), ("bfloat16",) * 2), (Hardware("cpu", "cpu"), ("float32",) * 2)])
def test_products_are_in_eight_bits_where_the_hardware_has_them(hardware, dtypes):
    """Also the gradient's, which are traced after the network's own choice is left."""
    def loss(x, w):
        with choosing(hardware=hardware):
            return fp8.matmul(x, w).astype(jnp.float32).sum()

    x, w = jnp.ones((4, 16), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16)
    forward, *backward = factors(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w).jaxpr)
    assert forward == (dtypes[0],) * 2
    assert len(backward) == 2 and all(set(pair) == set(dtypes) for pair in backward)
