"""Context parallelism: the tokens of one sample over several devices, around any attention kernel.

A network's streams [B, N, D] stay cut along N through the whole stack. Only attention looks across:

* Ulysses: an all-to-all gives every device all tokens of some heads, the kernel runs, another
  all-to-all brings the tokens back. Needs heads divisible by the devices.
* Ring: keys and values travel (`ring.py`). Needs nothing.
* Ulysses inside ring: the context axis is ring x ulysses, neighbours exchange heads.
* Cross-attention: few keys, everywhere; the queries stay where they are. No communication.
* Few queries (the discriminator's one per head block): plain JAX over keys that stay where they
  are; the compiler joins the parts of the softmax by all-reduces of one token's size.

Several streams in one attention (text and video) are joined device by device: each holds a piece
of every stream, side by side. The order of the tokens is then not the network's, which no softmax
notices, and no token moves for it. Where a stream's length does not divide, it is padded and the
padding masked; the padding up to the kernel's multiple is taken from the shortest stream.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from apt_jax.kernels import dispatch
from apt_jax.kernels.attention import local_attention
from apt_jax.parallel.mesh import BATCH_AXES, ulysses_size
from apt_jax.parallel.ring import PLAIN, Block, ring_attention
from apt_jax.parallel.sharding import layer_spec, path_string

RING, ULYSSES = "ring", "ulysses"  # the two parts of the context axis where it has both


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """Where tokens, heads and samples lie, and attention over them (a `kernels.scope.Scope`).

    Attributes:
      mesh: the run's mesh (`parallel.mesh`).
      ulysses: config.mesh.ulysses.
      kernel: attention on one device, (q, k, v, key_mask) -> [B, N, h, d]; where `hidden_last` is
        said and holds on the device it gets that too, by name.
      block: one turn of the ring; None takes what `kernels.dispatch` has for the arrays.
      multiple: the kernel wants token counts that this divides.
    """

    mesh: Mesh
    ulysses: int = -1
    kernel: Callable[..., jax.Array] = local_attention
    block: Block | None = None
    multiple: int = 1

    @property
    def ways(self) -> int:
        """Over how many devices the tokens of one sample are cut."""
        return self.mesh.shape["context"]

    @property
    def whole(self) -> bool:
        """See `kernels.scope.Scope.whole`."""
        return self.ways == 1

    # -- streams ---------------------------------------------------------------------------------

    def tokens(self, carry: Any) -> Any:
        """Every [B, N, D] of the tree with its tokens over context and its samples over the batch
        axes; other arrays stay as the compiler likes. A stream shorter than the axis lies whole."""
        def one(x):
            if x.ndim != 3:
                return x
            tokens = "context" if x.shape[1] >= self.ways > 1 else None
            spec = PartitionSpec(_batch_axes(self.mesh, x.shape[0]), tokens)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(one, carry)

    def samples(self, tree: Any) -> Any:
        """Every [B, ...] of the tree with its samples over the batch axes and all else whole.

        Left alone, what a matrix makes of the time lies cut like the matrix, and every layer
        gathers it together with its weights, which then cannot travel ahead.
        """
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, PartitionSpec(_batch_axes(self.mesh, x.shape[0])))), tree)

    def layer(self, params: Any) -> Any:
        """A layer's parameters whole on every device but for what the tensor axis cuts; their
        gradients leave by a reduce-scatter to where the parameters lie.

        Left to itself the compiler may move activations to the shards of a matrix instead, which
        is more traffic as soon as a batch has more numbers than the matrix.
        """
        def one(path, x):
            cut = layer_spec(path_string(path), x.shape, self.mesh)
            whole = PartitionSpec(*(a if a == "tensor" else None for a in cut))
            if cut == whole:
                return x
            return _gather(x, NamedSharding(self.mesh, whole), NamedSharding(self.mesh, cut))

        return jax.tree_util.tree_map_with_path(one, params)

    # -- attention -------------------------------------------------------------------------------

    def attention(self, q: Sequence[jax.Array], k: Sequence[jax.Array], v: Sequence[jax.Array],
                  key_mask: jax.Array | None, *, hidden_last: bool = False) -> list[jax.Array]:
        """See `kernels.scope.Scope.attention`; the same numbers as `local_attention`."""
        queries, keys = _lengths(q), _lengths(k)
        if queries == keys:
            return self._self_attention(q, k, v, key_mask, hidden_last)
        assert len(q) == len(k) == 1, "streams are joined in self-attention only"
        if queries[0] < max(2, self.ways):
            return [local_attention(q[0], k[0], v[0], key_mask, hidden_last=hidden_last)]
        return [self._cross_attention(q[0], k[0], v[0], key_mask, hidden_last)]

    def _kernel(self, hidden_last: bool) -> Callable[..., jax.Array]:
        return functools.partial(self.kernel, hidden_last=True) if hidden_last else self.kernel

    def _cross_attention(self, q, k, v, key_mask, hidden_last):
        """Queries over context, keys everywhere."""
        split, length = self._split_mesh(q), q.shape[1]
        q = _pad_tokens(q, -length % self.ways)
        batch, heads = split.batch, split.heads
        operands, specs = [q, k, v], [PartitionSpec(batch, split.tokens, heads)]
        specs += [PartitionSpec(batch, None, heads)] * 2
        if key_mask is not None:
            operands.append(key_mask)
            specs.append(PartitionSpec(batch))
        out = jax.shard_map(self._kernel(hidden_last), mesh=split.mesh, in_specs=tuple(specs),
                            out_specs=specs[0], check_vma=False)(*operands)
        return out[:, :length]

    def _self_attention(self, q, k, v, key_mask, hidden_last):
        """All streams together, every token over context."""
        split, lengths = self._split_mesh(q[0]), _lengths(q)
        padded = _padded(lengths, self.ways, self.multiple * split.ring)
        # The order is the streams' only where each lies whole, and nothing comes between them.
        kernel = self._kernel(hidden_last and self.whole and padded == lengths)
        if padded != lengths or key_mask is not None:
            key_mask = self._mask(key_mask, lengths, padded, q[0].shape[0])
            key_mask = key_mask.reshape(key_mask.shape[0], split.ring, -1)  # [B, R, tokens]
        parts = [_pad_tokens(x, p - n) for group in (q, k, v)
                 for x, n, p in zip(group, lengths, padded, strict=True)]

        def program(*operands):
            *parts, mask = operands if key_mask is not None else (*operands, None)
            count = len(parts) // 3
            local = [x.shape[1] for x in parts[:count]]
            join = lambda i: jnp.concatenate(parts[i * count:(i + 1) * count], axis=1)  # noqa: E731
            out = self._attend(join(0), join(1), join(2), mask, split, kernel)
            return tuple(jnp.split(out, np.cumsum(local)[:-1], axis=1))

        spec = PartitionSpec(split.batch, split.tokens, split.heads)
        specs = (spec,) * len(parts)
        if key_mask is not None:
            parts, specs = [*parts, key_mask], (*specs, PartitionSpec(split.batch))
        out = jax.shard_map(program, mesh=split.mesh, in_specs=specs,
                            out_specs=(spec,) * len(lengths), check_vma=False)(*parts)
        return [x[:, :n] for x, n in zip(out, lengths, strict=True)]

    def _attend(self, q, k, v, mask, split, kernel):
        """One device: q, k, v [b, n, h, d] of its tokens; mask [b, ring, tokens of a ring place]."""
        if split.ulysses > 1:
            # Named, so that a rematerialisation policy can keep them (nn/stack.py).
            q, k, v = (checkpoint_name(
                jax.lax.all_to_all(x, split.tokens[-1], 2, 1, tiled=True), "exchanged")
                for x in (q, k, v))
        if split.ring > 1:
            block = self.block or dispatch.blocks(q, k, v) or PLAIN
            out = ring_attention(q, k, v, mask, axis=split.tokens[0], size=split.ring, block=block)
        else:
            out = kernel(q, k, v, None if mask is None else mask[:, 0])
        if split.ulysses > 1:
            out = checkpoint_name(
                jax.lax.all_to_all(out, split.tokens[-1], 1, 2, tiled=True), "exchanged")
        return out  # [b, n, h, d]

    def _mask(self, key_mask, lengths, padded, batch):
        """bool [B or 1, all tokens], False for padding, in the order of the devices' pieces."""
        if key_mask is None:
            key_mask = jnp.ones((batch, sum(lengths)), bool)
        pieces, start = [], 0
        for n, p in zip(lengths, padded, strict=True):
            part = jnp.pad(key_mask[:, start:start + n], ((0, 0), (0, p - n)))
            pieces.append(part.reshape(part.shape[0], self.ways, -1))  # [B, devices, piece]
            start += n
        return jnp.concatenate(pieces, axis=2).reshape(key_mask.shape[0], -1)

    def _split_mesh(self, q: jax.Array) -> _Split:
        """The mesh with context as ring x ulysses for this q's heads, and how q lies on it.

        Where context is one of the two alone the mesh stays the network's own: kernels that lie in
        jax's custom_partitioning (cuDNN's) want one mesh in a whole program.
        """
        tensor = self.mesh.shape["tensor"]
        heads = "tensor" if q.shape[2] % tensor == 0 else None
        local = q.shape[2] // tensor if heads else q.shape[2]
        ulysses = ulysses_size(self.ways, local, self.ulysses)
        ring = self.ways // ulysses
        both = ring > 1 and ulysses > 1
        return _Split(_split_context(self.mesh, ulysses) if both else self.mesh, ulysses, ring,
                      (RING, ULYSSES) if both else ("context",),
                      _batch_axes(self.mesh, q.shape[0]), heads)


@dataclasses.dataclass(frozen=True)
class _Split:
    mesh: Mesh
    ulysses: int
    ring: int
    tokens: tuple[str, ...]  # the axes of `mesh` that are context, the ring's first
    batch: tuple[str, ...] | None
    heads: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, whole: NamedSharding, cut: NamedSharding) -> jax.Array:
    """x laid out as `whole`; its cotangent as `cut`."""
    return jax.lax.with_sharding_constraint(x, whole)


_gather.defvjp(lambda x, whole, cut: (_gather(x, whole, cut), None),
               lambda whole, cut, _, g: (jax.lax.with_sharding_constraint(g, cut),))


def on_mesh(mesh: Mesh, ulysses: int = -1, **kernel: Any) -> ContextParallel | None:
    """The scope of a network on this mesh; None where there is one device only."""
    return ContextParallel(mesh, ulysses, **kernel) if mesh.size > 1 else None


@functools.lru_cache(maxsize=64)
def _split_context(mesh: Mesh, ulysses: int) -> Mesh:
    """The same devices in the same order, the context axis as ring x ulysses (neighbours)."""
    names, sizes = [], []
    for name, size in mesh.shape.items():
        split = name == "context"
        names += (RING, ULYSSES) if split else (name,)
        sizes += (size // ulysses, ulysses) if split else (size,)
    return Mesh(mesh.devices.reshape(sizes), tuple(names),
                axis_types=(AxisType.Auto,) * len(names))


def _batch_axes(mesh: Mesh, batch: int) -> tuple[str, ...] | None:
    """The batch axes over which this many samples can be cut: all, one, or none (a picture's few
    prompts on many devices, each of which then computes all)."""
    for axes in (BATCH_AXES, *((a,) for a in BATCH_AXES)):
        if batch % math.prod(mesh.shape[a] for a in axes) == 0:
            return axes
    return None


def _lengths(parts: Sequence[jax.Array]) -> tuple[int, ...]:
    return tuple(part.shape[1] for part in parts)


def _padded(lengths: tuple[int, ...], ways: int, multiple: int) -> tuple[int, ...]:
    """Lengths that `ways` divides and whose sum `multiple` divides; the shortest takes the rest."""
    padded = [n + -n % ways for n in lengths]
    shortest = padded.index(min(padded))
    padded[shortest] += -sum(padded) % math.lcm(ways, multiple)
    return tuple(padded)


def _pad_tokens(x: jax.Array, count: int) -> jax.Array:
    """[B, N, h, d] with `count` more tokens of zeros."""
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x
