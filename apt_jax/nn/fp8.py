"""The blocks' matrix products in eight bits, put into a finished network (`model.matmul = "fp8"`).

Attention and MLP matrices of the blocks only, those that adapters take too (`nn.lora.MATRICES`):
embeddings, modulation, the output layer and the discriminator's heads stay in the config's dtype.

    net = Network.build(with_fp8(MMDiT maker))     # float masters, quantised in every call: trains
    served = stored(net)                           # weights kept in eight bits: a quarter of float32
    params = store(served, params)                 # the same numbers come out, to the bit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels.fp8 import E4M3, Quantised, matmul, matmul_quantised, quantise
from apt_jax.nn.functional import Network, Params
from apt_jax.nn.lora import MATRICES

KERNEL, SCALE = "kernel_fp8", "kernel_scale"


class Fp8Linear(nnx.Linear):
    """A dense layer that rounds its float kernel and its input to eight bits when it is called."""

    def __init__(self, linear: nnx.Linear):
        # Random keys of its own: what is made after it starts as in the network without.
        super().__init__(linear.in_features, linear.out_features, dtype=linear.dtype,
                         param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.kernel, self.bias = linear.kernel, linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)


class StoredFp8Linear(nnx.Module):
    """The same with the kernel in eight bits and a scale for each output.

    kernel_fp8 is [..., d_out, d_in]: cuBLASLt multiplies eight-bit matrices only where both are
    contiguous along the contraction, and would turn all layers' weights around in every call.
    """

    def __init__(self, layer: Fp8Linear):
        *stack, d_in, d_out = layer.kernel.shape
        self.dtype = layer.dtype
        self.kernel_fp8 = nnx.Param(jnp.zeros((*stack, d_out, d_in), E4M3))
        self.kernel_scale = nnx.Param(jnp.ones((*stack, d_out), jnp.float32))
        self.bias = layer.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        w = Quantised(self.kernel_fp8[...], self.kernel_scale[...][:, None])
        return matmul_quantised(x.astype(self.dtype), w) + self.bias[...].astype(self.dtype)


def with_fp8(make: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """`make(..., rngs=rngs)` whose modules multiply the MATRICES of their blocks in eight bits."""
    def made(*args: Any, rngs: nnx.Rngs, **kwargs: Any) -> nnx.Module:
        module = make(*args, rngs=rngs, **kwargs)
        _replace(module, nnx.Linear, Fp8Linear)
        return module

    return made


def _replace(module: nnx.Module, kind: type, change: Callable[[Any], nnx.Module]) -> None:
    found = [(parent, name) for path, parent in nnx.iter_modules(module) if "blocks" in path
             for name in MATRICES if isinstance(getattr(parent, name, None), kind)]
    for parent, name in found:
        setattr(parent, name, change(getattr(parent, name)))


def stored(net: Network) -> Network:
    """`net`, which is made with `with_fp8`, with its blocks' kernels in eight bits. For inference."""
    def make(rngs: nnx.Rngs) -> nnx.Module:
        module = net.make(rngs)
        _replace(module, Fp8Linear, StoredFp8Linear)
        return module

    return Network.build(make, attention=net.attention).on(net.scope)


def store(served: Network, params: Params) -> Params:
    """Float parameters -> those of `stored`'s network: blocks' kernels rounded once, the other
    matrices in the dtype that their layers compute in. Jittable."""
    def walk(node: Mapping[str, Any], shapes: Mapping[str, Any]) -> Params:
        if KERNEL in shapes:  # as Fp8Linear: first the dtype of the layer, then eight bits
            w = quantise(jnp.swapaxes(node["kernel"], -1, -2).astype(dtype), -1)
            return {KERNEL: w.values, SCALE: w.scale[..., 0], "bias": node["bias"]}
        return {key: walk(value, shapes[key]) if isinstance(value, Mapping) else value
                for key, value in node.items()}

    dtype = _dtype(served)
    return served.compute_copy(walk(params, served.shapes))


def _dtype(served: Network) -> Any:
    """What the network's stored layers compute in."""
    module = nnx.eval_shape(lambda: served.make(nnx.Rngs(0)))
    return next((layer.dtype for _, layer in nnx.iter_modules(module)
                 if isinstance(layer, StoredFp8Linear)), jnp.dtype(jnp.float32))
