"""The blocks' matrix products in eight bits, put into a finished network (`model.matmul = "fp8"`).

Attention and MLP matrices of the blocks only, those that adapters take too (`nn.lora.MATRICES`):
embeddings, modulation, the output layer and the discriminator's heads stay in the config's dtype.

    net = Network.build(with_fp8(MMDiT maker))     # float masters, quantised in every call: trains
    served = stored(net)                           # weights kept in eight bits: a quarter of float32
    params = store(served, params)                 # the same numbers come out, to the bit

The last blocks may stay in the config's dtype (`model.matmul_kept`): nothing behind them smooths what
they round, and their part of a deep network's products is small.
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
    """A dense layer that rounds its float kernel and its input to eight bits when it is called.

    kept: how many of the stack's last blocks do not.
    """

    def __init__(self, linear: nnx.Linear, kept: int = 0):
        # Random keys of its own: what is made after it starts as in the network without.
        super().__init__(linear.in_features, linear.out_features, dtype=linear.dtype,
                         param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.kernel, self.bias = linear.kernel, linear.bias
        self.kept, self.eight = kept, True

    def become(self, eight: bool) -> None:
        """One of the blocks that multiply in eight bits, or one of those that do not."""
        self.eight = eight

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.eight:
            return super().__call__(x)
        y = matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)


class StoredFp8Linear(nnx.Module):
    """The same with the kernel in eight bits and a scale for each output.

    kernel_fp8 is [..., d_out, d_in]: cuBLASLt multiplies eight-bit matrices only where both are
    contiguous along the contraction, and would turn all layers' weights around in every call.
    kernel is there where `kept` is not 0: [kept, d_in, d_out] of the last blocks, in `dtype`; the
    eight-bit arrays then are those of the other blocks.
    """

    def __init__(self, layer: Fp8Linear):
        *stack, d_in, d_out = layer.kernel.shape
        self.dtype, self.kept = layer.dtype, layer.kept
        if self.kept:
            self.kernel = nnx.Param(jnp.zeros((self.kept, d_in, d_out), self.dtype))
            stack[0] -= self.kept
        self.kernel_fp8 = nnx.Param(jnp.zeros((*stack, d_out, d_in), E4M3))
        self.kernel_scale = nnx.Param(jnp.ones((*stack, d_out), jnp.float32))
        self.bias = layer.bias

    def become(self, eight: bool) -> None:
        """See `Fp8Linear.become`; the other kind's arrays go."""
        for name in ("kernel",) if eight else (KERNEL, SCALE):
            delattr(self, name)

    def __call__(self, x: jax.Array) -> jax.Array:
        if not hasattr(self, KERNEL):
            return x.astype(self.dtype) @ self.kernel[...] + self.bias[...].astype(self.dtype)
        w = Quantised(self.kernel_fp8[...], self.kernel_scale[...][:, None])
        return matmul_quantised(x.astype(self.dtype), w) + self.bias[...].astype(self.dtype)


def with_fp8(make: Callable[..., nnx.Module], kept: int = 0) -> Callable[..., nnx.Module]:
    """`make(..., rngs=rngs)` whose modules multiply the MATRICES of their blocks in eight bits.

    kept: how many of the last blocks stay in their dtype; fewer than there are.
    """
    def made(*args: Any, rngs: nnx.Rngs, **kwargs: Any) -> nnx.Module:
        module = make(*args, rngs=rngs, **kwargs)
        _replace(module, nnx.Linear, lambda linear: Fp8Linear(linear, kept))
        return module

    return made


def _replace(module: nnx.Module, kind: type, change: Callable[[Any], nnx.Module]) -> None:
    found = [(parent, name) for path, parent in nnx.iter_modules(module) if "blocks" in path
             for name in MATRICES if isinstance(getattr(parent, name, None), kind)]
    for parent, name in found:
        setattr(parent, name, change(getattr(parent, name)))


def parts(blocks: nnx.Module, depth: int) -> list[tuple[int, int, Any, Any]]:
    """A stack of `depth` blocks as stacks of equal ones: (first, one behind the last, graphdef, state).

    One, but for a stack whose last blocks do not multiply in eight bits.
    """
    kinds = (Fp8Linear, StoredFp8Linear)
    kept = max((m.kept for _, m in nnx.iter_modules(blocks) if isinstance(m, kinds)), default=0)
    if not kept:
        return [(0, depth, *nnx.split(blocks))]

    def part(eight: bool) -> tuple[Any, Any]:
        own = nnx.clone(blocks)
        for layer in [m for _, m in nnx.iter_modules(own) if isinstance(m, kinds)]:
            layer.become(eight)
        graphdef, state = nnx.split(own)
        # What only one kind has is as long as that kind's part already.
        cut = slice(depth - kept) if eight else slice(-kept, None)
        return graphdef, jax.tree.map(lambda leaf: leaf[cut], state)

    return [(0, depth - kept, *part(True)), (depth - kept, depth, *part(False))]


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
            kernel = node["kernel"].astype(dtype)
            eight = kernel.shape[0] - (shapes["kernel"].shape[0] if "kernel" in shapes else 0)
            w = quantise(jnp.swapaxes(kernel[:eight], -1, -2), -1)
            rest = {"kernel": kernel[eight:]} if "kernel" in shapes else {}
            return {KERNEL: w.values, SCALE: w.scale[..., 0], "bias": node["bias"], **rest}
        return {key: walk(value, shapes[key]) if isinstance(value, Mapping) else value
                for key, value in node.items()}

    dtype = _dtype(served)
    return served.compute_copy(walk(params, served.shapes))


def _dtype(served: Network) -> Any:
    """What the network's stored layers compute in."""
    module = nnx.eval_shape(lambda: served.make(nnx.Rngs(0)))
    return next((layer.dtype for _, layer in nnx.iter_modules(module)
                 if isinstance(layer, StoredFp8Linear)), jnp.dtype(jnp.float32))
