"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + b + scale (x A) B, with W and b frozen.

The adapters are put into a finished module, so models do not know of them; in the parameter dict
they lie beside the kernel they adapt, as lora_a [..., d_in, r] and lora_b [..., r, d_out]. B starts
at zero: an adapted network begins as its base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.nn.functional import Params

A, B = "lora_a", "lora_b"
# Attention and MLP matrices of the blocks, by the names that every family gives them. Modulation,
# embeddings and the output layer stay as they are.
MATRICES = ("q", "k", "v", "qkv", "out", "up", "down")
_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as peft's


class LoRALinear(nnx.Linear):
    """A dense layer with an adapter of its own."""

    def __init__(self, linear: nnx.Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        *stack, d_in, d_out = linear.kernel.shape
        super().__init__(linear.in_features, linear.out_features, dtype=linear.dtype,
                         use_bias=linear.use_bias, param_dtype=jnp.float32, rngs=rngs)
        self.kernel, self.bias = linear.kernel, linear.bias
        self.lora_a = nnx.Param(_INIT(rngs.params(), (*stack, d_in, rank), jnp.float32))
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, d_out), jnp.float32))
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        base = super().__call__(x)
        a, b = (m[...].astype(base.dtype) for m in (self.lora_a, self.lora_b))
        return base + self.scale * ((x.astype(base.dtype) @ a) @ b)


def adapted(make: Callable[..., nnx.Module], rank: int, scale: float) -> Callable[..., nnx.Module]:
    """`make(..., rngs=rngs)` whose modules have adapters on the MATRICES of their blocks."""
    def made(*args: Any, rngs: nnx.Rngs, **kwargs: Any) -> nnx.Module:
        module = make(*args, rngs=rngs, **kwargs)
        found = [(parent, name) for path, parent in nnx.iter_modules(module) if "blocks" in path
                 for name in MATRICES if isinstance(getattr(parent, name, None), nnx.Linear)]
        for parent, name in found:
            setattr(parent, name, LoRALinear(getattr(parent, name), rank, scale, rngs=rngs))
        return module

    return made


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether a parameter's path is that of an adapter."""
    return path[-1] in (A, B)


def outside_backbone_or_adapter(path: tuple[str, ...]) -> bool:
    """What trains of an adapted discriminator: its heads, logit, and the backbone's adapters."""
    return path[0] != "backbone" or is_adapter(path)


def split(params: Params, keep: Callable[[tuple[str, ...]], bool] = is_adapter
          ) -> tuple[Params, Params]:
    """(the parameters whose path `keep` holds of, the others), as two nested dicts."""
    def walk(node: Mapping[str, Any], path: tuple[str, ...]) -> tuple[Params, Params]:
        yes: Params = {}
        no: Params = {}
        for key, value in node.items():
            here = (*path, str(key))
            if isinstance(value, Mapping):
                a, b = walk(value, here)
                yes |= {key: a} if a else {}
                no |= {key: b} if b else {}
            else:
                (yes if keep(here) else no)[key] = value
        return yes, no

    return walk(params, ())


def join(first: Params | None, second: Params) -> Params:
    """The inverse of `split`; None is nothing."""
    if first is None:
        return second
    joined = dict(first)
    for key, value in second.items():
        joined[key] = join(joined[key], value) if key in joined else value
    return joined


def merge(params: Params, scale: float) -> Params:
    """Adapters into their kernels, W + scale A B: the parameters of a network without adapters."""
    merged: Params = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            merged[key] = merge(value, scale)
        elif key == "kernel" and A in params:
            merged[key] = value + scale * (params[A] @ params[B])
        elif key not in (A, B):
            merged[key] = value
    return merged
