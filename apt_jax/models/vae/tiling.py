"""Large pictures in overlapping tiles, blended: diffusers' `enable_tiling`, tile for tile.

A tiled result is not the untiled one: inside a tile the middle block attends to that tile alone,
and the convolutions see zeros beyond it. What must hold is equality with diffusers' own tiled
output, so that a VAE used there and here gives the same latents and pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from apt_jax.errors import UserError
from apt_jax.models.vae.config import VAEConfig


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Size and distance of the tiles in pixels; the defaults are diffusers'.

    Attributes: height, width: of a tile; stride_height, stride_width: from one to the next.
    """

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self) -> None:
        for size, stride, name in ((self.height, self.stride_height, "height"),
                                   (self.width, self.stride_width, "width")):
            if not 0 < stride <= size:
                raise UserError(f"tiles of {name} {size} cannot lie {stride} apart; set a stride "
                                f"from 1 to {size}")

    def plan(self, config: VAEConfig, decode: bool) -> Plan:
        """In the units of the encoder's or the decoder's input and output."""
        unit = config.spatial
        numbers = (self.height, self.width, self.stride_height, self.stride_width)
        if any(n % unit for n in numbers):
            raise UserError(f"tiles of {self.height} x {self.width} pixels, {self.stride_height} "
                            f"and {self.stride_width} apart, do not fit the VAE; use multiples of "
                            f"{unit}")
        pixels = ((self.height, self.width), (self.stride_height, self.stride_width))
        latents = tuple((h // unit, w // unit) for h, w in pixels)
        return Plan(*latents, *pixels) if decode else Plan(*pixels, *latents)


Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tile and stride as (height, width) of the input, then of the output."""

    tile: Size
    stride: Size
    out_tile: Size
    out_stride: Size

    def needed(self, height: int, width: int) -> bool:
        """Whether an input of this size is tiled at all."""
        return height > self.tile[0] or width > self.tile[1]


def tiled(one: Callable[[jax.Array], jax.Array], x: jax.Array, plan: Plan) -> jax.Array:
    """`one` over the tiles of x [B, F, H, W, C], its results blended into [B, F', H', W', C'].

    Tiles of one shape (there are at most four) run one after the other in a `lax.map`: one compiled
    network for each shape, and the memory of one tile.
    """
    height, width = x.shape[2:4]
    tops, lefts = range(0, height, plan.stride[0]), range(0, width, plan.stride[1])
    cut = {(i, j): x[:, :, top : top + plan.tile[0], left : left + plan.tile[1]]
           for i, top in enumerate(tops) for j, left in enumerate(lefts)}
    shapes: dict[tuple[int, ...], list[Size]] = {}
    for place, tile in cut.items():
        shapes.setdefault(tile.shape, []).append(place)
    done: dict[Size, jax.Array] = {}
    for places in shapes.values():
        results = jax.lax.map(one, jnp.stack([cut[place] for place in places]))
        done.update(zip(places, results, strict=True))
    out = (height * plan.out_tile[0] // plan.tile[0], width * plan.out_tile[1] // plan.tile[1])
    return _blend(done, len(tops), len(lefts), plan)[:, :, : out[0], : out[1]]


def _blend(tiles: dict[Size, jax.Array], rows: int, columns: int, plan: Plan) -> jax.Array:
    """Row by row, each tile faded in over its (already blended) upper and left neighbours."""
    overlap = [tile - stride for tile, stride in zip(plan.out_tile, plan.out_stride, strict=True)]
    lines = []
    for i in range(rows):
        line = []
        for j in range(columns):
            tile = tiles[i, j]
            if i:
                tile = fade(tiles[i - 1, j], tile, overlap[0], axis=2)
            if j:
                tile = fade(tiles[i, j - 1], tile, overlap[1], axis=3)
            tiles[i, j] = tile
            line.append(tile[:, :, : plan.out_stride[0], : plan.out_stride[1]])
        lines.append(jnp.concatenate(line, axis=3))
    return jnp.concatenate(lines, axis=2)


def fade(before: jax.Array, tile: jax.Array, extent: int, axis: int) -> jax.Array:
    """The first `extent` places of `tile` along axis, mixed linearly with the last of `before`.

    Place i is before * (1 - i / extent) + tile * i / extent; the extent is at most either's size.
    """
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent < 1:
        return tile
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    new = jax.lax.slice_in_dim(tile, 0, extent, axis=axis)
    weight = jnp.arange(extent, dtype=jnp.float32) / extent
    weight = weight.reshape(-1, *(1,) * (tile.ndim - axis - 1))
    mixed = (old * (1 - weight) + new * weight).astype(tile.dtype)
    rest = jax.lax.slice_in_dim(tile, extent, None, axis=axis)
    return jnp.concatenate([mixed, rest], axis=axis)
