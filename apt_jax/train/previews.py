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
from apt_jax.data.quantise import pad_states
from apt_jax.diffusion import samplers
from apt_jax.errors import UserError
from apt_jax.parallel.mesh import replicated

PIXELS = 96  # shown size of one sample's side
NOISE_SEED = 20_250_108
SCAN = 20_000  # records looked through for the prompts' captions


class Previews:
    """Draws RUN/samples/step_XXXXXX.png, or .webp for clips; of one shape.

    One-step samples in the stages that make a one-step generator, the guided Euler sampler in
    pre-training; always of the averaged weights. The noise depends on nothing but NOISE_SEED.
    """

    def __init__(self, config: Any, velocity: Callable[..., jax.Array], mesh: Mesh,
                 folder: Path, prompts: Sequence[str], text: np.ndarray, text_mask: np.ndarray,
                 negative_text: np.ndarray, negative_mask: np.ndarray,
                 shape: tuple[int, ...]):
        """
        Args:
          prompts: N captions; text [N, L, D] and text_mask [N, L] are their states.
          negative_text, negative_mask: [L, D], [L], the guidance's negative prompt.
          shape: (F, H, W, C) of one sample.
        """
        self._folder, self._prompts = folder, list(prompts)
        put = functools.partial(jax.device_put, device=replicated(mesh))
        self._inputs = put((np.asarray(text, np.float32), np.asarray(text_mask, bool),
                            np.asarray(negative_text, np.float32),
                            np.asarray(negative_mask, bool)))
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


def find_prompts(dataset: Any, prompts: Sequence[str], warn: Callable[[str], None]
                 ) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions and their text states [N, L, D], [N, L] for the pictures of a run.

    Prompts that are captions of the data set take their stored states, others are encoded where
    the text encoder is at hand and fits; what remains is left out with a warning. With nothing
    left, the first records' own captions are drawn.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    wanted = set(prompts)
    for index in range(min(dataset.records, SCAN)):
        if wanted <= found.keys():
            break
        record = dataset.record(index)
        if record.caption in wanted and record.caption not in found:
            found[record.caption] = pad_states(record.text(), dataset.max_text_tokens)
    if missing := [prompt for prompt in prompts if prompt not in found]:
        try:
            found.update(_encode(dataset, missing))
        except UserError as error:
            warn(f"warning: no pictures of {', '.join(map(repr, missing))} while training: no such "
                 f"caption in the data set, and {error}")
    if not found:
        for index in range(min(dataset.records, max(1, len(prompts)))):
            record = dataset.record(index)
            found[record.caption] = pad_states(record.text(), dataset.max_text_tokens)
    shown = [prompt for prompt in prompts if prompt in found] or list(found)
    text, mask = zip(*(found[prompt] for prompt in shown), strict=True)
    return shown, np.stack(text), np.stack(mask)


def _encode(dataset: Any, prompts: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from apt_jax.data.captions import TextEncoder

    if TextEncoder.width != dataset.text_width:
        raise UserError(f"the text encoder here gives {TextEncoder.width} channels, the data set "
                        f"has {dataset.text_width}")
    text, mask = TextEncoder().encode(prompts, dataset.max_text_tokens)
    return {prompt: (text[i], mask[i]) for i, prompt in enumerate(prompts)}
