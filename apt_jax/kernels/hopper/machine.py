"""What the Hopper kernels are written in, and stand-ins for what jax's interpreter cannot run.

A program is three warpgroups of 128 threads: two compute, one copies tiles from memory ahead of
them (TMA). Products are asynchronous and accumulate in registers; a tile of scores and everything per
row of it stay in registers too. Interpreted on a CPU copies, barriers, slots and indices are what a
GPU would run; products, layouts and positions are plain JAX there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPUTE = 2  # warpgroups that compute; the next one copies
# Registers a thread, of the 168 that three warpgroups start with: what copies gives up, others use.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24
TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # a value for each row of a tile
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # a value for each column


@dataclasses.dataclass(frozen=True)
class Machine:
    """interpret: on a CPU, by jax's interpreter of Mosaic GPU."""

    interpret: bool

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """float32, constant: a tile [rows, columns] or a value for each row [rows]."""
        x = jnp.full(shape, value, jnp.float32)
        return x if self.interpret else plgpu.layout_cast(x, TILE if len(shape) == 2 else ROW)

    def positions(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """int32 [rows, columns]: the number of each element's row (axis 0) or column (1)."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)

    def vector(self, ref: Any, layout: Any) -> jax.Array:
        """A vector of shared memory as a value for each row or column of a tile."""
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=layout)

    def products(self, pairs: Sequence[tuple[Any, Any]]) -> list[jax.Array]:
        """a b^T of each pair, float32; a [M, K] and b [N, K] in shared memory, all issued at once."""
        if self.interpret:
            return [_dot(a, b.T) for a, b in ((_read(a), _read(b)) for a, b in pairs)]

        def run(*accumulators):
            for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
                plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
            return [accumulator[...] for accumulator in accumulators]

        return pl.run_scoped(run, *(plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32)
                                    for a, b in pairs))

    def add_product(self, total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
        """total + a b, float32; a [M, K] in registers, b [K, N] in shared memory."""
        if self.interpret:
            return total + _dot(a, _read(b))
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))

    def scores_while(self, q: Any, k: Any, total: jax.Array, b: Any, state: tuple,
                     issued: Callable[[], None], meanwhile: Callable[..., tuple]
                     ) -> tuple[jax.Array, tuple]:
        """(total + state[0] b, meanwhile(q k^T, *state)): both products at once, `meanwhile` while the
        first of these two still runs.

        q [M, K], k [N, K] and b [N, L] in shared memory; total [M, L] and state, whose first is [M, N],
        in registers. meanwhile returns a new state; issued() runs when both are on their way.
        """
        if self.interpret:
            issued()
            return total + _dot(state[0], _read(b)), meanwhile(_dot(_read(q), _read(k).T), *state)

        def run(refs):
            ref, *kept = refs

            def scores(accumulator):
                before = tuple(x[...] for x in kept)
                plgpu.wgmma(accumulator, q, plgpu.transpose_ref(k, (1, 0)))
                plgpu.wgmma(ref, before[0], b)
                issued()
                found = meanwhile(plgpu.wgmma_accumulator_load(accumulator, wait_n=1), *before)
                for x, value in zip(kept, found, strict=True):
                    x[...] = value

            pl.run_scoped(scores, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

        total, *found = pl.run_state(run)((plgpu.ACC.init(total), *state))
        return total, tuple(found)


def _read(ref: Any) -> jax.Array:
    """What a product reads, interpreted. Products read past the caches of ordinary loads, as copies write:
    the fence says so to the interpreter's search for races."""
    x = ref[...]
    plgpu.commit_smem()
    return x


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for tiles [..., rows, channels] that products read; rows of 128 bytes, swizzled."""
    return plgpu.SMEM(shape, dtype, transforms=(
        plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def per_row(values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[rows] -> [rows, columns]."""
    return lax.broadcast_in_dim(values, shape, [0])


def per_column(values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[columns] -> [rows, columns]."""
    return lax.broadcast_in_dim(values, shape, [1])


def copy_ahead(tiles: Any, slots: int,
               streams: Sequence[tuple[Any, Callable[[Any, Any], None]]]) -> None:
    """What the copying warpgroup does: fills slots of shared memory as they become free.

    tiles: how many there are. streams: (barriers that say a slot is free, copy(i, slot) of tile i).
    """
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

    @pl.loop(0, tiles)
    def _(i):
        slot = lax.rem(i, jnp.int32(slots))
        for free, copy in streams:
            @pl.when(i >= slots)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            copy(i, slot)

    @pl.loop(jnp.maximum(tiles - slots, 0), tiles)
    def _(i):  # no barrier is left half-way
        for free, _ in streams:
            plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(slots))])


def last_first(i: Any, tiles: Any, tile: int) -> Any:
    """The tokens of tile i where the last of `tiles`, which may have hidden keys, is the first."""
    return pl.ds((lax.select(i == 0, tiles, i) - 1) * tile, tile)


def kernel(body: Any, name: str, out_type: Any, grid: dict[str, int], scratch: Sequence[Any],
           machine: Machine) -> Any:
    """A program for each point of the grid; `body` takes input, output and scratch references and finds
    its place by the grid's names and its warpgroup by "wg"."""
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=list(scratch), grid=tuple(grid.values()),
        grid_names=tuple(grid), num_threads=COMPUTE + 1, thread_name="wg",
        kernel_name=name,  # which vmap keeps, and the function's own it does not
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if machine.interpret else False)


def _interpreter() -> Any:
    found = getattr(plgpu, "InterpretGPUParams", None)
    if found is None:  # not exported before jax 0.11
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as found
    return found()
