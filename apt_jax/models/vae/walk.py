"""What one walk through the network carries beside the activations: the past, and the neighbours.

A clip is worked through in chunks. `Walk` holds, for every causal convolution in the order in which
they run, the last frames of the chunk before; `Rows` says which part of the height a device holds
when the height is split over a mesh axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Caches = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The height, split evenly over a mesh axis inside shard_map.

    Attributes:
      axis: name of the mesh axis; ways: its size.
      local: latent rows on each device; real: latent rows of the whole picture. ways * local may be
        more: the rows at the end are padding, and read as zeros.
    """

    axis: str
    ways: int
    local: int
    real: int

    @property
    def padded(self) -> bool:
        return self.ways * self.local != self.real

    def is_real(self, rows: int) -> jax.Array:
        """bool [rows]: which of this device's rows belong to the picture, at any resolution."""
        place = jax.lax.axis_index(self.axis) * rows + jnp.arange(rows)
        return place < self.real * (rows // self.local)

    def halo(self, x: jax.Array, above: int, below: int) -> jax.Array:
        """x [B, F, H, W, C] with the neighbours' rows: [B, F, above + H + below, W, C].

        Beyond the picture's edge they are zero, which is the padding of the convolutions.
        """
        if self.padded:
            x = jnp.where(self.is_real(x.shape[2])[:, None, None], x, 0)
        parts = [x]
        if above:
            down = [(i, i + 1) for i in range(self.ways - 1)]
            parts.insert(0, jax.lax.ppermute(x[:, :, -above:], self.axis, down))
        if below:
            up = [(i + 1, i) for i in range(self.ways - 1)]
            parts.append(jax.lax.ppermute(x[:, :, :below], self.axis, up))
        return jnp.concatenate(parts, axis=2)

    def gather(self, tokens: jax.Array) -> jax.Array:
        """[N, H W, C] of this device's rows -> those of all rows, top to bottom."""
        return jax.lax.all_gather(tokens, self.axis, axis=1, tiled=True)


class Walk:
    """One chunk's way through the encoder or the decoder.

    Attributes:
      first: this chunk begins the clip: its first frame has no past and is not resampled in time.
      new: the caches that the next chunk needs, complete after the walk.
      rows: the height split, or None.
    """

    def __init__(self, caches: Sequence[jax.Array] | None = None, rows: Rows | None = None):
        self.first = caches is None
        self.new: list[jax.Array] = []
        self.rows = rows
        self._old = list(caches or ())

    def with_past(self, x: jax.Array, count: int) -> jax.Array:
        """x [B, F, H, W, C] behind its `count` predecessors: [B, count + F, H, W, C].

        Before the clip begins there are zeros. Remembers the last `count` frames.
        """
        if self.first:
            past = jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype)
        else:
            past = self._old[len(self.new)]
        x = jnp.concatenate([past, x], axis=1)  # XLA fuses it with the norm that made x
        self.new.append(x[:, -count:])
        return x

    def caches(self) -> Caches:
        """The past of the next chunk; a loop may carry it: one shape whatever the chunk."""
        if not self.first and len(self.new) != len(self._old):
            raise AssertionError(f"{len(self._old)} caches came in, {len(self.new)} go out")
        return tuple(self.new)
