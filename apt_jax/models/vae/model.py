"""Encode and decode whole clips: chunks in a scan, latents normalised.

    vae = make_vae(VAEConfig())
    z = vae.encode(params, x)        # x [B, 1 + 4k, H, W, 3] in [-1, 1] -> [B, 1 + k, H/8, W/8, 16]
    y = vae.decode(params, z)        # back

Both are pure functions of the parameters: jit them. The first latent stands for one frame and
every other for four, so the first chunk runs alone and the others in a `lax.scan` that carries the
last two frames of every convolution. Memory then depends on the chunk and not on the clip, and the
result equals one pass over the whole clip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.errors import UserError
from apt_jax.models.vae.config import VAEConfig
from apt_jax.models.vae.network import DecodingHalf, EncodingHalf
from apt_jax.models.vae.tiling import Tiling, tiled
from apt_jax.models.vae.walk import Caches, Rows, Walk
from apt_jax.nn.functional import Network, Params

# (one chunk [B, F, ...], the caches or None) -> (its output, the next chunk's caches)
Step = Callable[[jax.Array, Caches | None], tuple[jax.Array, Caches]]


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so jax.jit(vae.decode) works
class VAE:
    """The autoencoder without its parameters.

    Either half works without the other's parameters. Attributes: config; encoder and decoder, the
    halves as networks.
    """

    config: VAEConfig
    encoder: Network
    decoder: Network

    def abstract(self) -> Params:
        """Nested dict of jax.ShapeDtypeStruct, the parameters of both halves, float32."""
        return {**self.encoder.abstract(), **self.decoder.abstract()}

    def init(self, key: jax.Array) -> Params:
        """Random parameters of both halves (float32 nested dict). Jittable."""
        encoder, decoder = jax.random.split(key)
        return {**self.encoder.init(encoder), **self.decoder.init(decoder)}

    def parameter_count(self) -> int:
        """Number of parameters of both halves, without allocating them."""
        return self.encoder.parameter_count() + self.decoder.parameter_count()

    def encode(self, params: Params, x: jax.Array, *, chunk: int = 1,
               tiling: Tiling | None = None, rows: Rows | None = None) -> jax.Array:
        """The mean latents of a clip, normalised.

        Args:
          params: nested dict of arrays.
          x: [B, 1 + 4k, H, W, 3] in [-1, 1], any float dtype; H and W multiples of 8.
          chunk: latents per step of the scan.
          tiling: cut pictures larger than a tile into tiles.
          rows: for `encode_sharded`.

        Returns float32 [B, 1 + k, H / 8, W / 8, 16]. UserError for other sizes.
        """
        moments = self.moments(params, x, chunk=chunk, tiling=tiling, rows=rows)
        return self.normalise(moments[..., : self.config.latent_channels])

    def moments(self, params: Params, x: jax.Array, *, chunk: int = 1,
                tiling: Tiling | None = None, rows: Rows | None = None) -> jax.Array:
        """Mean and log variance as the network gives them: [B, 1 + k, H / 8, W / 8, 32]."""
        latents = self.config.latent_shape(*x.shape[1:4])[0]
        head, step = self.cut(latents, chunk)
        one = partial(_run, self.encode_step(params, rows), head=self.config.pixel_frames(head),
                      size=step * self.config.frames)
        return self._whole_or_tiled(one, x, tiling, decode=False)

    def decode(self, params: Params, z: jax.Array, *, chunk: int = 1, clamp: bool = True,
               tiling: Tiling | None = None, rows: Rows | None = None) -> jax.Array:
        """Pixels of normalised latents.

        Args:
          params: nested dict of arrays.
          z: [B, 1 + k, H', W', 16] as `encode` gives them.
          chunk: latents per step of the scan; more use a GPU better and need more memory.
          clamp: to [-1, 1], as diffusers does; False leaves the network's own values.
          tiling: cut pictures larger than a tile into tiles.
          rows: for `decode_sharded`.

        Returns [B, 1 + 4k, 8 H', 8 W', 3] in the compute dtype.
        """
        head, step = self.cut(z.shape[1], chunk)
        one = partial(_run, self.decode_step(params, rows), head=head, size=step)
        y = self._whole_or_tiled(one, z, tiling, decode=True)
        return jnp.clip(y, -1, 1) if clamp else y

    def _whole_or_tiled(self, one: Callable[[jax.Array], jax.Array], x: jax.Array,
                        tiling: Tiling | None, decode: bool) -> jax.Array:
        plan = tiling.plan(self.config, decode) if tiling is not None else None
        if plan is None or not plan.needed(*x.shape[2:4]):
            return one(x)
        return tiled(one, x, plan)

    def encode_step(self, params: Params, rows: Rows | None = None) -> Step:
        """Pixels of one chunk -> moments; for loops of one's own."""
        params = self.cast(_half(self.encoder, params))

        def step(x: jax.Array, caches: Caches | None) -> tuple[jax.Array, Caches]:
            walk = Walk(caches, rows)
            return self.encoder.bind(params)(x, walk), walk.caches()

        return step

    def decode_step(self, params: Params, rows: Rows | None = None) -> Step:
        """Normalised latents of one chunk -> pixels, not clamped; for loops of one's own."""
        params = self.cast(_half(self.decoder, params))

        def step(z: jax.Array, caches: Caches | None) -> tuple[jax.Array, Caches]:
            walk = Walk(caches, rows)
            return self.decoder.bind(params)(self.denormalise(z), walk), walk.caches()

        return step

    def normalise(self, mean: jax.Array) -> jax.Array:
        """(mean - m) / s over the last axis, float32."""
        return ((mean.astype(jnp.float32) - jnp.asarray(self.config.mean, jnp.float32))
                / jnp.asarray(self.config.std, jnp.float32))

    def denormalise(self, z: jax.Array) -> jax.Array:
        """The inverse of `normalise`."""
        return (z.astype(jnp.float32) * jnp.asarray(self.config.std, jnp.float32)
                + jnp.asarray(self.config.mean, jnp.float32))

    def cast(self, params: Params) -> Params:
        """Convolutions in the compute dtype, once and not in every step; norms stay float32."""
        dtype = jnp.dtype(self.config.dtype)

        def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            return leaf if path[-1].key == "scale" else jnp.asarray(leaf, dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    def cut(self, latents: int, chunk: int) -> tuple[int, int]:
        """Latents in the first chunk (the odd ones with it) and in every other."""
        if chunk < 1:
            raise UserError(f"chunk = {chunk} must be at least 1; set it to 1")
        return 1 + (latents - 1) % chunk, chunk


def make_vae(config: VAEConfig) -> VAE:
    """The autoencoder of a config; allocates nothing."""
    return VAE(config, Network.build(lambda rngs: EncodingHalf(config, rngs=rngs)),
               Network.build(lambda rngs: DecodingHalf(config, rngs=rngs)))


def _half(network: Network, params: Params) -> Params:
    return {name: params[name] for name in network.shapes}


def _run(step: Step, x: jax.Array, head: int, size: int) -> jax.Array:
    """`step` over x [B, F, ...]: the first `head` frames, then a scan over chunks of `size`."""
    y, caches = step(x[:, :head], None)
    count = (x.shape[1] - head) // size
    if not count:
        return y
    b, rest = x.shape[0], x.shape[2:]
    chunks = jnp.moveaxis(x[:, head:].reshape(b, count, size, *rest), 1, 0)  # [n, B, size, ...]

    def body(caches: Caches, part: jax.Array) -> tuple[Caches, jax.Array]:
        out, caches = step(part, caches)
        return caches, out

    _, ys = jax.lax.scan(body, caches, chunks)  # [n, B, F of a chunk, ...]
    ys = jnp.moveaxis(ys, 0, 1).reshape(b, -1, *y.shape[2:])
    return jnp.concatenate([y, ys], axis=1)
