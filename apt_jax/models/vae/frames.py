"""From a sampler's latents to bytes on the host, a few frames on the device at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apt_jax.errors import UserError
from apt_jax.models.vae.model import VAE
from apt_jax.models.vae.sharded import decode_sharded
from apt_jax.models.vae.tiling import Tiling
from apt_jax.models.vae.walk import Caches
from apt_jax.nn.functional import Params


class FrameDecoder:
    """Normalised latents -> uint8 frames; compiled once per latent size.

    Without tiles or a mesh the clip is decoded chunk by chunk and every chunk's bytes leave the
    device at once, so that the device holds neither the clip nor its float pixels.
    """

    def __init__(self, vae: VAE, params: Params, *, chunk: int = 1, batch: int = 1,
                 tiling: Tiling | None = None, mesh: Mesh | None = None, axis: str = ""):
        """
        Args:
          params: float arrays; a copy in the compute dtype is kept on the device.
          chunk: latents per step. batch: clips at a time.
          tiling: cut large pictures into tiles; not together with a mesh.
          mesh, axis: split the height over this axis.
        """
        if tiling is not None and mesh is not None:
            raise UserError("a decoder cannot cut into tiles and split over a mesh at once; leave "
                            "out one of the two")
        self.vae, self.batch, self.chunk = vae, batch, chunk
        # On a mesh every device gets the parameters and gives all frames.
        self._place = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
        placed = {} if mesh is None else {"out_shardings": self._place}
        self.params = jax.jit(vae.cast, **placed)(params)
        self._streams = tiling is None and mesh is None
        whole = (partial(decode_sharded, vae, mesh=mesh, axis=axis) if mesh is not None
                 else partial(vae.decode, tiling=tiling))

        def finish(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            """media.to_uint8 on the device, and whether there was a NaN."""
            y = y.astype(jnp.float32)
            frames = jnp.clip(jnp.rint((y + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
            return frames, jnp.isnan(y).any()

        def at_once(params: Params, z: jax.Array):
            return finish(whole(params, z, chunk=chunk))

        def step(params: Params, z: jax.Array, caches: Caches | None):
            y, caches = vae.decode_step(params)(z, caches)
            return *finish(y), caches

        self._at_once = jax.jit(at_once, **placed)
        self._step = jax.jit(step, donate_argnums=2)  # new caches take the old one's place

    def frame_shape(self, latents: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(F, H, W, 3) of latents (F', H', W', C)."""
        f, h, w, c = latents
        config = self.vae.config
        if c != config.latent_channels:
            raise UserError(f"these latents have {c} channels, the VAE takes "
                            f"{config.latent_channels}; use the VAE that made the data")
        return (config.pixel_frames(f), h * config.spatial, w * config.spatial, config.channels)

    def __call__(self, latents: np.ndarray, advance: Callable[[int], None] | None = None
                 ) -> np.ndarray:
        """latents float [N, F', H', W', 16] -> frames uint8 [N, F, H, W, 3].

        advance: told how many frames were finished since the last call (Progress.advance).
        UserError for latents that hold NaN, or are not this VAE's.
        """
        out = np.empty((len(latents), *self.frame_shape(latents.shape[1:])), np.uint8)
        for start in range(0, len(latents), self.batch):
            z = latents[start : start + self.batch]
            missing = self.batch - len(z) if start else 0  # the last batch reuses the program
            z = np.concatenate([z, np.repeat(z[-1:], missing, axis=0)])
            z = jax.device_put(z, self._place)
            count, at = len(z) - missing, 0
            for frames, broken in self._parts(z):
                if broken:
                    raise UserError("the decoded frames contain NaN; the latents or the VAE's "
                                    "weights are broken")
                frames = np.asarray(frames)[:count]
                out[start : start + count, at : at + frames.shape[1]] = frames
                at += frames.shape[1]
                if advance is not None:
                    advance(count * frames.shape[1])
        return out

    def _parts(self, z: jax.Array):
        """Consecutive (frames uint8, whether NaN) of one batch."""
        if not self._streams:
            yield self._at_once(self.params, z)
            return
        head = 1 + (z.shape[1] - 1) % self.chunk
        caches = None
        for start in (0, *range(head, z.shape[1], self.chunk)):
            part = z[:, start : start + (self.chunk if start else head)]
            frames, broken, caches = self._step(self.params, part, caches)
            yield frames, broken
