"""The product of a dense layer, with the gradient of its matrix written for CPUs.

Differentiating x W gives dW as a transposed (dy^T x), and XLA folds the transposition into a product
that contracts the first axis of one operand and the last of the other. Its CPU library has no fast
case for that (docs/benches.md says what it cost). So dW is written as x^T dy. On GPUs and TPUs every order is as fast, and the derivative stays jax's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

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
        return _dense(scope.current() is None)(x, w)
    return lax.dot_general(x, w, dimensions, **set_options)


@functools.cache
def _dense(flat: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """x W. flat: dW is one product over all rows, whichever axes they lie on."""
    @jax.custom_vjp
    def dense(x, w):
        return _product(x, w)

    def forward(x, w):
        # What only the other's gradient needs is not kept where there is none: of a frozen matrix.
        kept = x.value if w.perturbed else None, w.value if x.perturbed else None
        return _product(x.value, w.value), kept

    def backward(kept, dy):
        x, w = kept
        if isinstance(dy, SymbolicZero):
            return None, None
        dx = None if w is None else lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
        if x is None:
            return dx, None
        if flat:
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        rows = tuple(range(x.ndim - 1))
        return dx, lax.dot_general(x, dy, ((rows, rows), ((), ())))

    dense.defvjp(forward, backward, symbolic_zeros=True)
    return dense


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))
