"""Pictures of fixed prompts from fixed noise while a run trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apt_jax import media
from apt_jax.diffusion import samplers
from apt_jax.parallel.mesh import replicated

PIXELS = 96  # shown size of one sample's side
NOISE_SEED = 20_250_108


class Previews:
    """Draws RUN/samples/step_XXXXXX.png, or .webp for clips.

    One-step samples in the stages that make a one-step generator, the guided Euler sampler in
    pre-training; always of the averaged weights. The noise depends on nothing but NOISE_SEED.
    """

    def __init__(self, config: Any, velocity: Callable[..., jax.Array], mesh: Mesh,
                 folder: Path, prompts: Sequence[str], text: np.ndarray, text_mask: np.ndarray,
                 null_text: np.ndarray, null_mask: np.ndarray, shape: tuple[int, ...]):
        """
        Args:
          prompts: N captions; text [N, L, D] and text_mask [N, L] are their states.
          null_text, null_mask: [L, D], [L], the empty caption.
          shape: (F, H, W, C) of one sample.
        """
        self._folder, self._prompts = folder, list(prompts)
        put = functools.partial(jax.device_put, device=replicated(mesh))
        self._inputs = put((np.asarray(text, np.float32), np.asarray(text_mask, bool),
                            np.asarray(null_text, np.float32), np.asarray(null_mask, bool)))
        self._key = put(jax.random.key(NOISE_SEED))
        sample = config.sample
        one_step = config.stage != "pretrain"

        def draw(params, key, text, text_mask, null_text, null_mask):
            z = jax.random.normal(key, (text.shape[0], *shape), jnp.float32)
            bound = functools.partial(velocity, params)
            if one_step:
                return samplers.one_step(bound, z, text, text_mask)
            return samplers.euler(bound, z, text, text_mask, null_text, null_mask,
                                  steps=sample.steps, guidance=sample.guidance,
                                  shift=sample.shift)

        self._draw = jax.jit(draw, out_shardings=replicated(mesh))

    def write(self, step: int, params: Any) -> Path | None:
        """Draws with `params`; the picture's path (None on processes that do not write)."""
        samples = self._draw(params, self._key, *self._inputs)  # [N, F, H, W, C]
        if jax.process_index() != 0:
            return None
        frames = media.to_uint8(jax.device_get(samples))
        stem = self._folder / f"step_{step:06d}"
        if frames.shape[1] == 1:
            return media.save_png(stem.with_suffix(".png"), media.grid(
                frames[:, 0], labels=self._prompts, size=PIXELS))
        return media.save_webp(stem.with_suffix(".webp"), media.clip_grid(
            frames, labels=self._prompts, size=PIXELS))
