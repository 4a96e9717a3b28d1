"""Linear layers with float32 masters and a compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels.product import dot_general

_FAN_IN = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_ZEROS = nnx.initializers.zeros_init()


def linear(
    d_in: int, d_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, zero: bool = False
) -> nnx.Linear:
    """Dense layer [..., d_in] -> [..., d_out], float32 parameters, computing in `dtype`.

    zero: start at 0 (modulations and the output layer, so that a new network is the identity).
    """
    return nnx.Linear(
        d_in, d_out, dtype=dtype, param_dtype=jnp.float32, rngs=rngs, dot_general=dot_general,
        kernel_init=_ZEROS if zero else _FAN_IN,
    )


class MLP(nnx.Module):
    """Linear, tanh-approximated GELU, linear: [..., dim] -> [..., dim], hidden width dim * ratio."""

    def __init__(self, dim: int, ratio: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = round(dim * ratio)  # 1536 * (8960 / 1536) must give 8960
        self.up = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))
