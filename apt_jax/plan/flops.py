"""FLOPs of a function, counted in its jaxpr: matrix products and convolutions, times trip counts.

XLA's own analysis counts the body of a scan once; here a scanned layer counts as often as it runs.
A product inside the named scope "attention" counts as attention, so the two costs of a transformer
are told apart; one that jax made by transposing (the backward pass) counts as backward too.
Elementwise work is not counted: it is bound by memory, not by arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core

from apt_jax.kernels.normalize import SUM_SCOPE

ATTENTION_SCOPE = "attention"
TRANSPOSED = "transpose("  # how jax's name stacks mark what the backward pass runs


@dataclasses.dataclass
class Flops:
    """Floating point operations (a multiply-add is two); backward is a part of the three others."""

    matmul: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.convolution

    @property
    def forward(self) -> float:
        """What no gradient asked for. Where layers are recomputed that counts as backward."""
        return self.total - self.backward

    def add(self, other: Flops, times: float = 1.0) -> None:
        self.matmul += times * other.matmul
        self.attention += times * other.attention
        self.convolution += times * other.convolution
        self.backward += times * other.backward


class UncountedError(ValueError):
    """A part of the program whose work cannot be read off its jaxpr."""


def count_flops(function: Any, *args: Any) -> Flops:
    """FLOPs of one call over the whole batch and all devices.

    Args:
      function: a jitted function, or what `jax.make_jaxpr` can trace.
      args: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      UncountedError: a while loop (its trip count is data) or a kernel that does products.
    """
    # A jitted function that has compiler options can only be traced by itself.
    trace = getattr(function, "trace", None)
    return jaxpr_flops((trace(*args).jaxpr if trace else jax.make_jaxpr(function)(*args)).jaxpr)


def jaxpr_flops(jaxpr: Any, backward: bool = False, attention: bool = False) -> Flops:
    """FLOPs of a jaxpr (open or closed). backward, attention: the whole of it belongs to one."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = Flops()
    for equation in jaxpr.eqns:
        _count(equation, found, backward, attention)
    return found


def _count(equation: Any, found: Flops, backward: bool, attention: bool) -> None:
    name, params = equation.primitive.name, equation.params
    # The names of what is called begin anew: a part of attention may not say that it is one.
    names = str(equation.source_info.name_stack)
    backward = backward or TRANSPOSED in names
    attention = attention or ATTENTION_SCOPE in names
    if SUM_SCOPE in names:
        return  # no product where it is not written for a CPU
    if name == "dot_general":
        work = _dot(equation)
        if attention:
            found.attention += work
        else:
            found.matmul += work
        found.backward += work if backward else 0.0
    elif name == "conv_general_dilated":
        work = _convolution(equation)
        found.convolution += work
        found.backward += work if backward else 0.0
    elif name == "scan":
        found.add(jaxpr_flops(params["jaxpr"], backward, attention), params["length"])
    elif name == "cond":
        branches = [jaxpr_flops(branch, backward, attention) for branch in params["branches"]]
        found.add(max(branches, key=lambda f: f.total))
    elif name == "while":
        for part in ("cond_jaxpr", "body_jaxpr"):
            if jaxpr_flops(params[part]).total:
                raise UncountedError("a while loop does matrix products; its trip count is unknown")
    elif name == "shard_map":
        manual = params.get("manual_axes") or params["mesh"].axis_names
        shards = math.prod(params["mesh"].shape[axis] for axis in manual)
        found.add(jaxpr_flops(params["jaxpr"], backward, attention), shards)
    elif name == "pallas_call":
        raise UncountedError("a Pallas kernel's loops cannot be counted; trace with the oracle "
                             "attention (model.attention=oracle)")
    else:
        for inner in _inner(params):
            found.add(jaxpr_flops(inner, backward, attention))


def _inner(params: dict) -> list[Any]:
    """The jaxprs of a call (jit, remat, custom derivatives); of several, the one that runs."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            return [params[key]]
    return [value for value in params.values()
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]


def _dot(equation: Any) -> float:
    """2 x (elements of the result) x (length of the contraction)."""
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)


def _convolution(equation: Any) -> float:
    """2 x (elements of the result) x (kernel positions x input channels of a group)."""
    kernel = equation.invars[1].aval.shape
    spec = equation.params["dimension_numbers"].rhs_spec  # (out, in, spatial...)
    taps = math.prod(kernel[i] for i in spec[1:])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps
