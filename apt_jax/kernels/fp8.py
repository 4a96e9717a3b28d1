"""Matrix products in eight bits: float8_e4m3fn forward, float8_e5m2 gradients, scaled on the fly.

Every row of activations (a token) and every column of weights (an output channel) has a scale of its
own, its largest value over the format's. Scales stand outside a product only where they are constant
along its contraction; in the gradients they are not, so they are multiplied into the gradient before
that is rounded (`_backward`), and nothing is rounded that the formats could hold.

A product of e4m3 numbers has three bits of mantissa in each factor: a relative error of about 3.7% of
its own size whatever the scales, against 0.2% in bfloat16.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from apt_jax.kernels import choice

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# NVIDIA's first compute capability with eight-bit tensor cores (Ada; Hopper is 9.0).
CAPABILITY = 8.9
# Below this no scale falls: rows of zeros divide by it, and float32 holds its quotient by 448.
TINY = 1e-30


class Quantised(NamedTuple):
    """x is about values * scale: values in eight bits like x, scale float32 with size 1 where the
    largest was taken."""

    values: jax.Array
    scale: jax.Array


def quantise(x: jax.Array, axis: int, dtype: Any = E4M3) -> Quantised:
    """x [...] float -> eight bits, one scale for each slice along `axis`.

    A slice with a NaN or an infinity becomes NaN as a whole: it is not hidden.
    """
    h, limit = x.astype(jnp.float32), float(jnp.finfo(dtype).max)
    scale = jnp.maximum(jnp.max(jnp.abs(h), axis=axis, keepdims=True), TINY) / limit
    # e4m3 has no infinity: what a rounded quotient exceeds the limit by would be NaN.
    return Quantised(jnp.clip(h / scale, -limit, limit).astype(dtype), scale)


def widened() -> Any:
    """What eight-bit factors are widened to before they are multiplied, which changes no product:

    None where the hardware that is traced for multiplies them itself.
    """
    hardware = choice.hardware()
    if hardware.platform == "gpu" and hardware.capability >= CAPABILITY:
        return None
    return jnp.float32 if hardware.platform == "cpu" else jnp.bfloat16


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: Any, wide: Any
             ) -> jax.Array:
    """a [M, K] or [K, M] times b [K, N] or [N, K], unscaled, summed in float32 -> [M, N]."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    if wide is None:  # in the layer's dtype: with float32 cuBLASLt needs ten times the scratch
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)
    return jax.lax.dot_general(a.astype(wide), b.astype(wide), dimensions,
                               preferred_element_type=jnp.float32)


def _scaled(product: jax.Array, *scales: jax.Array, dtype: Any) -> jax.Array:
    return math.prod(scales, start=product.astype(jnp.float32)).astype(dtype)


def _multiply(rows: Quantised, columns: Quantised, dtype: Any, wide: Any) -> jax.Array:
    """[T, K] with a scale a row times [K, N] with a scale a column -> [T, N]."""
    return _scaled(_product(rows.values, columns.values, (1, 0), dtype, wide), rows.scale,
                   columns.scale, dtype=dtype)


def _rows(x: jax.Array) -> Quantised:
    """[..., K] -> [T, K], a scale for each row."""
    return quantise(x.reshape(-1, x.shape[-1]), -1)


def matmul_quantised(x: jax.Array, w: Quantised) -> jax.Array:
    """x [..., K] times weights that are quantised already, turned: values [N, K], scale [N, 1].

    Returns [..., N] in x's dtype, `matmul`'s numbers. For inference: it has no gradient of its own.
    """
    rows = _rows(x)
    y = _scaled(_product(rows.values, w.values, (1, 1), x.dtype, widened()), rows.scale, w.scale.T,
                dtype=x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K] @ w [K, N] -> [..., N], all of one float dtype, in eight bits.

    Differentiable once, with respect to both: gradients are rounded to e5m2 and meet the same
    rounded x and w as the forward pass.
    """
    return _matmul(x, w, widened())  # asked for here: the backward pass is traced elsewhere


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, wide):
    return _forward(x, w, wide)[0]


def _forward(x, w, wide):
    rows, columns = _rows(x), quantise(w, 0)
    y = _multiply(rows, columns, x.dtype, wide)
    return y.reshape(*x.shape[:-1], -1), (rows, columns)


def _backward(wide, kept, g):
    rows, columns = kept
    h = g.reshape(-1, g.shape[-1]).astype(jnp.float32)  # [T, N]
    # dx = (g * w's scale) w^T: that scale runs along the contraction over N
    to_x = quantise(h * columns.scale, -1, E5M2)
    dx = _scaled(_product(to_x.values, columns.values, (1, 1), g.dtype, wide), to_x.scale,
                 dtype=g.dtype)
    # dw = x^T (x's scale * g): along the contraction over T
    to_w = quantise(h * rows.scale, 0, E5M2)
    dw = _scaled(_product(rows.values, to_w.values, (0, 0), g.dtype, wide), to_w.scale,
                 dtype=g.dtype)
    return dx.reshape(*g.shape[:-1], -1), dw


_matmul.defvjp(_forward, _backward)
