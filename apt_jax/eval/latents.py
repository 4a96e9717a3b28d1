"""Generators that make latents: the VAE and the text encoder of the checkpoint they began with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from apt_jax.errors import UserError
from apt_jax.eval.progress import Progress
from apt_jax.models.vae import FrameDecoder, Tiling, load_vae


def decode_latents(decoder: FrameDecoder, latents: np.ndarray, label: str = "") -> np.ndarray:
    """Normalised latents float [N, F', H', W', 16] -> frames uint8 [N, F, H, W, 3].

    label: names a progress line on stderr; empty shows none.
    """
    total = len(latents) * decoder.frame_shape(latents.shape[1:])[0]
    with Progress(total, label, "frames") as progress:
        return decoder(latents, progress.advance)


class LatentSpace:
    """What stands between a generator's latents and people: read when it is first used.

    Attributes: base, the component folder; dtype, of the VAE's and the text encoder's computation.
    """

    def __init__(self, base: Path, dtype: str, *, tiled: bool = False,
                 devices: np.ndarray | None = None):
        """
        Args:
          tiled: decode in diffusers' tiles.
          devices: those of a mesh, all of which then decode one clip, each a part of its height.
        """
        self.base, self.dtype = base, dtype
        self._tiling = Tiling() if tiled else None
        self._mesh = None
        if devices is not None:
            self._mesh = Mesh(devices.reshape(-1), ("rows",), axis_types=(AxisType.Auto,))

    @functools.cached_property
    def decoder(self) -> FrameDecoder:
        vae, params = load_vae(self.base, self.dtype)
        del params["encoder"]  # half of the memory
        return FrameDecoder(vae, params, tiling=self._tiling, mesh=self._mesh, axis="rows")

    @functools.cached_property
    def text_encoder(self) -> Any:
        """Looks like data.captions.TextEncoder: name, width, encode(captions, max_tokens)."""
        from apt_jax.data.text_encoders import load_text_encoder

        return load_text_encoder(self.base, self.dtype)

    def default_size(self, data: Any) -> tuple[int, int, int]:
        """Frames, height and width in pixels of config.data, which counts latents; 0 is unknown."""
        config = self.decoder.vae.config
        return (config.pixel_frames(max(data.frames)), data.height * config.spatial,
                data.width * config.spatial)

    def shape(self, model: Mapping[str, Any], frames: int, height: int, width: int
              ) -> tuple[int, int, int, int]:
        """The latent (F', H', W', C) of a size in pixels, checked against VAE and network."""
        config = self.decoder.vae.config
        if config.latent_channels != model["in_channels"]:
            raise UserError(f"the VAE in {self.base} has {config.latent_channels} latent channels, "
                            f"the generator {model['in_channels']}; give the generator's own base")
        for name, size, patch in zip(("height", "width"), (height, width), model["patch"][1:]):
            unit = config.spatial * patch
            if size < unit or size % unit:
                near = max(1, round(size / unit)) * unit
                raise UserError(f"{name} = {size} is not a multiple of {unit} (VAE "
                                f"{config.spatial}, patch {patch}); the nearest is {near}")
        shape = config.latent_shape(frames, height, width)
        if shape[0] % model["patch"][0]:
            raise UserError(f"frames = {frames} give {shape[0]} latent frames, no multiple of the "
                            f"network's patch {model['patch'][0]}; choose another count")
        return shape
