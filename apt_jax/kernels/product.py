"""The product of a dense layer, with the gradient of its matrix written for CPUs.

Differentiating x W gives dW as a transposed (dy^T x), and XLA folds the transposition into a product
that contracts the first axis of one operand and the last of the other. Its CPU library has no fast
case for that: 41 GFLOP/s a core where the other orders run at 100 (docs/benches.md). So dW is written
as x^T dy. On GPUs and TPUs every order is as fast, and the derivative stays jax's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import lax

from apt_jax.kernels import choice, scope


def dot_general(x: jax.Array, w: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """`lax.dot_general`; on a CPU a dense layer's, [..., d_in] by [d_in, d_out], as said above.

    options: lax.dot_general's own, which differ between versions of jax; None is its default.
    """
    set_options = {name: value for name, value in options.items() if value is not None}
    dense = (((x.ndim - 1,), (0,)), ((), ()))
    if (w.ndim == 2 and dimensions == dense and x.dtype == w.dtype and not set_options
            and choice.hardware().platform == "cpu"):
        # On a mesh tokens may lie on an axis of their own: samples and tokens stay apart.
        return _dense(x, w, scope.current() is None)
    return lax.dot_general(x, w, dimensions, **set_options)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x, w, flat):
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _forward(x, w, flat):
    return _dense(x, w, flat), (x, w)


def _backward(flat, residuals, dy):
    x, w = residuals
    dx = lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    if flat:
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    rows = tuple(range(x.ndim - 1))
    return dx, lax.dot_general(x, dy, ((rows, rows), ((), ())))


_dense.defvjp(_forward, _backward)
