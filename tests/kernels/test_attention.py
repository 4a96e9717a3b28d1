"""The attention oracle against float64 numpy, with mask and derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.kernels.attention import attention

B, Q, K, HEADS, DIM = 2, 5, 7, 3, 4
RNG = np.random.default_rng(0)
QKV = [RNG.normal(size=(B, n, HEADS, DIM)) for n in (Q, K, K)]
MASK = np.array([[True] * 7, [True, False, True, True, False, True, False]])


def by_hand(q, k, v, mask=None):
    """float64, one head and query at a time, masked keys left out altogether."""
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = np.arange(k.shape[1]) if mask is None else np.flatnonzero(mask[b])
        score = k[b, keys, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        out[b, i, h] = weight @ v[b, keys, h] / weight.sum()
    return out


def single(arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_equals_float64(mask):
    out = attention(*single(QKV), None if mask is None else jnp.asarray(mask))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, by_hand(*QKV, mask), rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = (100 * QKV[0], 100 * QKV[1], QKV[2])
    np.testing.assert_allclose(
        attention(*single((q, k, v))), by_hand(q, k, v), rtol=1e-3, atol=1e-3
    )


def test_bfloat16_with_a_float32_softmax():
    rounded = [a.astype(jnp.bfloat16) for a in single(QKV)]
    out = attention(*rounded, jnp.asarray(MASK))
    assert out.dtype == jnp.bfloat16
    expected = by_hand(*[np.asarray(a, np.float64) for a in rounded], MASK)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2)
    text = str(jax.make_jaxpr(attention)(*rounded))
    exponentials = [line for line in text.splitlines() if " exp " in line]
    assert exponentials and all("f32" in line for line in exponentials)


def test_masked_keys_have_no_influence_and_get_no_gradient():
    q, k, v = single(QKV)
    mask = jnp.asarray(MASK)
    hidden = ~mask[:, :, None, None]
    plain = attention(q, k, v, mask)
    np.testing.assert_array_equal(
        attention(q, jnp.where(hidden, 1e4, k), jnp.where(hidden, -1e4, v), mask), plain
    )
    grads = jax.grad(lambda k, v: (attention(q, k, v, mask) ** 2).sum(), argnums=(0, 1))(k, v)
    for g in grads:
        np.testing.assert_array_equal(np.where(hidden, g, 0), 0)
        assert np.abs(np.where(hidden, 1, g)).min() > 0


def test_first_and_second_derivative():
    """Along two random directions, against float64 finite differences of the hand-written one."""
    u, w = ([RNG.normal(size=a.shape) for a in QKV] for _ in range(2))
    weights = RNG.normal(size=QKV[0].shape)

    def value(a, b):
        return (weights * by_hand(*[x + a * y + b * z for x, y, z in zip(QKV, u, w)], MASK)).sum()

    h = 1e-3
    first = (value(h, 0) - value(-h, 0)) / (2 * h)
    second = (value(h, h) - value(h, -h) - value(-h, h) + value(-h, -h)) / (4 * h * h)

    def ours(q, k, v):
        return (jnp.asarray(weights, jnp.float32) * attention(q, k, v, jnp.asarray(MASK))).sum()

    args, u, w = single(QKV), single(u), single(w)
    dot = lambda a, b: sum((x * y).sum() for x, y in zip(a, b))  # noqa: E731
    gradient = jax.grad(ours, argnums=(0, 1, 2))
    np.testing.assert_allclose(dot(gradient(*args), u), first, rtol=1e-4)

    def along_u(*args):
        return dot(gradient(*args), u)

    hessian_u = jax.jit(jax.grad(along_u, argnums=(0, 1, 2)))(*args)
    np.testing.assert_allclose(dot(hessian_u, w), second, rtol=1e-3)
