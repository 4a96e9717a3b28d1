"""A Flax NNX module used as a pure function of a plain parameter dict.

The optimiser, the checkpoints, the sharding rules and the weight files all want one thing: a nested
dict of arrays with string keys. `Network` keeps the module's static part (graphdef) and turns
`net(params, *inputs)` into a pure function, so G and D stay separate and either can be differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels.choice import choosing
from apt_jax.kernels.scope import Scope, entered

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so jax.jit(net) works
class Network:
    """Static description of a module: how to make it, and its graph without the arrays.

    scope: how its tokens and attention lie on a mesh (`on`); None is one device.
    attention: the attention kernel by name, one of `kernels.choice.BACKENDS`.
    computed_in: path of a matrix -> the dtype that its layer casts it to.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any = dataclasses.field(repr=False)
    shapes: Params = dataclasses.field(repr=False)
    scope: Scope | None = None
    attention: str = "auto"
    computed_in: dict[tuple[str, ...], Any] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, make: Callable[[nnx.Rngs], nnx.Module], *, attention: str = "auto") -> Network:
        """Trace `make(rngs)` abstractly: no array is allocated, whatever the size."""
        module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        graphdef, state = nnx.split(module)
        computed_in = {
            (*map(str, path), "kernel"): jnp.dtype(layer.dtype)
            for path, layer in nnx.iter_modules(module)
            if isinstance(layer, nnx.Linear) and layer.dtype is not None}
        return cls(make, graphdef, nnx.to_pure_dict(state), attention=attention,
                   computed_in=computed_in)

    def on(self, scope: Scope | None) -> Network:
        """The same network with its forward pass on a mesh."""
        return dataclasses.replace(self, scope=scope)

    def abstract(self) -> Params:
        """Nested dict of jax.ShapeDtypeStruct, the shapes and dtypes of `init`'s result."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.shapes)

    def init(self, key: jax.Array) -> Params:
        """Random parameters (float32 nested dict). Jittable; give out_shardings to shard them."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key))))

    def compute_copy(self, params: Params) -> Params:
        """params with every matrix in the dtype its layer computes in: the same numbers come out.

        The layers cast by themselves, but inside the scan over layers, after their float32 masters
        were gathered; cast first, half as many bytes travel and a frozen network takes half the
        memory.
        """
        def cast(node: Any, path: tuple[str, ...]) -> Any:
            if isinstance(node, dict):
                return {key: cast(value, (*path, str(key))) for key, value in node.items()}
            dtype = self.computed_in.get(path)
            return node if dtype is None or node.dtype == dtype else node.astype(dtype)

        return cast(params, ())

    def bind(self, params: Params) -> nnx.Module:
        """The module with these parameters, for calls other than the forward pass."""
        return nnx.merge(self.graphdef, params)

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        with entered(self.scope), choosing(backend=self.attention):
            return self.bind(params)(*args, **kwargs)

    def parameter_count(self) -> int:
        """Number of parameters, without allocating them."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))
