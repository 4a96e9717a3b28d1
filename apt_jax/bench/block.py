"""One block of a network, beside the sum of its own matrix products and its attention.

The products are read off the block's jaxpr and timed one by one; what the block takes beyond them and
its attention is norms, modulation, rotary positions, rounding to eight bits and what lies between.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from apt_jax.bench import programs
from apt_jax.bench.attention import ours
from apt_jax.bench.attention_peers import inputs_of
from apt_jax.bench.arrays import random_like
from apt_jax.bench.case import SETS, Case
from apt_jax.bench.cases import MARKERS, AttentionCase
from apt_jax.bench.programs import tokens
from apt_jax.bench.report import config_digest, row_name
from apt_jax.bench.tables import pairs_of
from apt_jax.bench.timing import measure
from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.kernels.choice import choosing
from apt_jax.kernels.normalize import SUM_SCOPE
from apt_jax.models import mmdit
from apt_jax.models.presets import model_config
from apt_jax.models.wan import model as wan
from apt_jax.nn.fp8 import with_fp8
from apt_jax.nn.functional import Network
from apt_jax.nn.rope import Rotation
from apt_jax.nn.stack import run_stack, stack
from apt_jax.plan.devices import elsewhere
from apt_jax.plan.flops import ATTENTION_SCOPE, count_flops
from apt_jax.plan.programs import text_length

PARTS = ("forward", "gradient")


class _Stack(nnx.Module):
    """A stack of one block: it is scanned and recomputed as in the network."""

    def __init__(self, c: Any, block: Any, *, rngs: nnx.Rngs):
        self.remat = c.remat
        self.blocks = stack(lambda r: block(c, rngs=r), 1, rngs)

    def __call__(self, carry: Any, *rest: Any, **fixed: Any) -> Any:
        def step(block, carry):
            streams = carry if isinstance(carry, tuple) else (carry,)
            return block(*streams, *rest, **fixed)

        return run_stack(self.blocks, step, carry, depth=1, remat=self.remat)[0]


def _whole(config: Any, device: Any, queries: int, keys: int) -> dispatch.Whole:
    """`dispatch.whole` as the network asks it, for the device's kernel."""
    c = model_config(config.model)
    with elsewhere(device), choosing(backend=config.model.attention):
        try:
            return dispatch.whole(1, queries, keys, c.heads, c.head_dim, c.compute_dtype)
        except UserError:  # which the row will say when it is compiled
            return dispatch.Whole(queries, keys, False)


def _inputs(config: Any, device: Any, array: Callable[..., Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The carry and everything else that a block of config.model takes, abstract, with the tokens
    that the network makes for the device's kernel; and what is no array of it, by name."""
    c = model_config(config.model)
    dtype, width, length = c.compute_dtype, c.width, text_length(config)
    count = tokens(config) - length
    half = c.head_dim // 2

    def rotation(*tokens):
        return Rotation(*[array((*tokens, half), jnp.float32)] * 2)

    def whole(queries, keys):
        return _whole(config, device, queries, keys)

    if config.model.family == "wan":
        real = (count, c.text_tokens or length)
        count = whole(count, count).keys
        return (array((1, count, width), dtype), array((1, whole(count, real[1]).keys, width), dtype),
                array((1, 6, width), jnp.float32), rotation(count)), {"real": real}
    condition = width * (6 if c.modulation == "shared" else 1)
    joined = whole(length + count, length + count)
    length = joined.keys - count
    turns = rotation(1, length) if joined.lengths else rotation(length)
    return (((array((1, count, width), dtype), array((1, length, width), dtype)),
             array((1, condition), dtype), (rotation(count), turns),
             array((1, length + count), jnp.bool_)), {"hidden_last": joined.lengths})


def _function(config: Any, part: str, fixed: dict[str, Any]) -> tuple[Network, Callable[..., Any]]:
    c = model_config(config.model)
    block = {"mmdit": mmdit.Block, "wan": wan.Block}[config.model.family]
    make = with_fp8(_Stack) if config.model.matmul == "fp8" else _Stack
    net = Network.build(lambda rngs: make(c, block, rngs=rngs), attention=config.model.attention)
    if part == "forward":
        return net, lambda params, *inputs: net(params, *inputs, **fixed)

    def loss(params, carry, *rest):
        return sum(jnp.sum(x.astype(jnp.float32) * _waves(x.shape)) for x in jax.tree.leaves(
            net(params, carry, *rest, **fixed)))

    return net, jax.grad(loss, (0, 1))


def _waves(shape: tuple[int, ...]) -> jax.Array:
    """A cotangent for [B, N, C] that is the same nowhere: hardware multiplies ones faster."""
    def axis(n):
        return jax.lax.broadcasted_iota(jnp.float32, shape, n)

    return jnp.cos(1.7 * axis(len(shape) - 2) + 0.9 * axis(len(shape) - 1))


def block_case(config: Any, device: Any, part: str, overrides: Sequence[str] = ()) -> Case:
    """One block of config.model on one sample. part: "forward", or "gradient" with respect to
    parameters and tokens, with the forward pass that it needs and nothing recomputed."""
    config = config.copy_and_resolve_references()
    config.model.remat = "none"
    place = SingleDeviceSharding(device)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    inputs, fixed = _inputs(config, device, array)
    net, function = _function(config, part, fixed)
    params = jax.tree.map(lambda a: array(a.shape, a.dtype),
                          jax.eval_shape(net.compute_copy, net.abstract()))
    backend = config.model.attention

    def flops() -> float:
        plain = config.copy_and_resolve_references()
        plain.model.attention, plain.model.matmul = "oracle", "dtype"
        inputs, fixed = _inputs(plain, device, array)
        return count_flops(_function(plain, part, fixed)[1], params, *inputs).total

    alone = config.copy_and_resolve_references()
    alone.mesh.context = 1  # a block is measured on one device, whatever the mesh
    attentions = 2 if config.model.family == "wan" else 1
    kernels = {name: attentions * counts[PARTS.index(part)]
               for name, counts in MARKERS.get(backend, {}).items()}
    eight = programs.products(config)
    if part == "gradient":  # of weights too, and of inputs but Wan's text, which is not carried
        eight += eight + programs.MATRICES[config.model.family] - 2 * (attentions - 1)
    return Case(row_name(config.name, "block", part, config.model.matmul, backend,
                         overrides=overrides),
                f"block {part}", backend, jax.jit(function), (params, *inputs), flops, kernels,
                eight if config.model.matmul == "fp8" else None, pairs_of(alone),
                exactly=part == "forward")


class Product(NamedTuple):
    """A matrix product: shapes and dtypes of both factors, what is contracted, the result's dtype."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    dtypes: tuple[str, str]
    dimensions: Any
    result: str

    def function(self) -> Callable[..., Any]:
        return jax.jit(lambda a, b: jax.lax.dot_general(
            a, b, self.dimensions, preferred_element_type=jnp.dtype(self.result)))

    def args(self, sharding: Any) -> tuple[Any, Any]:
        return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
                     for shape, dtype in zip((self.left, self.right), self.dtypes, strict=True))


def products(jaxpr: Any) -> collections.Counter[Product]:
    """The matrix products of a jaxpr outside attention, sums among them aside, and how often each runs."""
    found: collections.Counter[Product] = collections.Counter()
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        names = str(equation.source_info.name_stack)
        if ATTENTION_SCOPE in names or SUM_SCOPE in names:
            continue
        if equation.primitive.name == "dot_general":
            a, b = (v.aval for v in equation.invars)
            found[Product(a.shape, b.shape, (str(a.dtype), str(b.dtype)),
                          equation.params["dimension_numbers"],
                          str(equation.outvars[0].aval.dtype))] += 1
            continue
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    for product, count in products(inner).items():
                        found[product] += times * count
    return found


def parts_of(config: Any, device: Any, part: str, seconds: float) -> dict[str, float]:
    """Seconds of a block's matrix products, one after another, and of its attention alone."""
    return {"products_seconds": _products_of(config, device, part, seconds),
            "attention_seconds": _attention_of(config, device, part, seconds)}


# No kernel of attention has a say in a block's products: they are timed once for all of them.
_TIMED: dict[tuple, float] = {}


def _products_of(config: Any, device: Any, part: str, seconds: float) -> float:
    plain = config.copy_and_resolve_references()
    plain.model.attention, plain.model.remat = "oracle", "none"
    key = (config_digest(plain), part, device, seconds)
    if key in _TIMED:
        return _TIMED[key]
    case = block_case(plain, device, part)  # plain JAX: no padding in it
    place, total = SingleDeviceSharding(device), 0.0
    counted = products(jax.make_jaxpr(case.function)(*case.args))
    for product, count in counted.items():
        sets = [random_like(product.args(place), seed) for seed in range(SETS)]
        total += count * measure(product.function(), sets, jax.block_until_ready,
                                 seconds=seconds).median
    _TIMED[key] = total
    return total


def _attention_of(config: Any, device: Any, part: str, seconds: float) -> float:
    """The block's own: its tokens up to whole tiles, its mask, and hidden keys last."""
    length = text_length(config)
    count, heads = tokens(config), config.model.heads
    joined = _whole(config, device, count, count)
    # (queries, keys, keys that are shown where there is a mask, whether the hidden are last)
    each = [(joined.keys, joined.keys, joined.keys, joined.lengths)]
    if config.model.family == "wan":
        text = config.model.text_tokens or length
        count -= length
        video = _whole(config, device, count, count).keys
        words = _whole(config, device, video, text).keys
        each = [(video, keys, shown if shown < keys else None, shown < keys)
                for keys, shown in ((video, count), (words, text))]
    attention = 0.0
    for queries, keys, shown, last in each:
        one = AttentionCase("", queries, keys, heads, config.model.head_dim,
                            hidden=None, dtype=config.model.dtype)
        mask = [] if shown is None else [jnp.arange(keys)[None] < shown]
        sets = inputs_of(part, [(*one.arrays(seed), *mask) for seed in range(SETS)])
        attention += measure(ours(config.model.attention, part, last), sets,
                             jax.block_until_ready, seconds=seconds).median
    return attention
