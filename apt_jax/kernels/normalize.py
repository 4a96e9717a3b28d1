"""(x - mean) / deviation over the last axis, with its sums written for CPUs.

XLA:CPU cuts a sum over the last axis into a tree of windows, three kernels for each, which cost two to
four times what a product with a vector of ones does and are most of what there is to compile. So on a
CPU the means are such products, in the gradient too, which is written by hand for that. On GPUs and
TPUs sums are fused with what is around them, and the derivative stays jax's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from apt_jax.kernels import choice

SUM_SCOPE = "sum_by_product"  # by this name plan/flops.py tells these from products of matrices


def normalize(x: jax.Array, eps: float, *, centred: bool) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis of float [..., D]; centred: of x - mean(x)."""
    if choice.hardware().platform == "cpu":
        return _by_products(x, eps, centred)
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def mean(x: jax.Array) -> jax.Array:
    """The mean over the last axis of [..., D], kept, [..., 1], as a product."""
    return total(x) / x.shape[-1]


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis of [..., D], kept, [..., 1], as a product in full precision."""
    ones = jnp.ones((x.shape[-1], 1), x.dtype)
    with jax.named_scope(SUM_SCOPE):
        return lax.dot_general(x, ones, (((x.ndim - 1,), (0,)), ((), ())),
                               precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_products(x, eps, centred):
    return _forward(x, eps, centred)[0]


def _forward(x, eps, centred):
    if centred:
        x = x - mean(x)
    inverse = lax.rsqrt(mean(x * x) + eps)  # [..., 1]
    y = x * inverse
    return y, (y, inverse)


def _backward(eps, centred, kept, dy):
    y, inverse = kept
    # y's length is fixed, and its mean where it is centred: dy loses its parts along both.
    dx = dy - y * mean(dy * y)
    if centred:
        dx = dx - mean(dy)
    return (dx * inverse,)


_by_products.defvjp(_forward, _backward)
