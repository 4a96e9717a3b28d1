"""The Python interface: load a checkpoint, sample, show, save. `apt-jax sample` uses the same.

    import apt_jax
    generator = apt_jax.load("bundled:base")
    samples = generator.sample(["red heart"], mode="euler", seed=0)
    apt_jax.show(samples)
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from apt_jax import media
from apt_jax.config import base_config, load_kept
from apt_jax.config.validate import check_kept
from apt_jax.convert.provenance import history
from apt_jax.data.metadata import is_text
from apt_jax.errors import UserError
from apt_jax.eval.generate import (
    Generation,
    Itself,
    check_mode,
    check_sampling,
    generation_of,
    sample_noise,
)
from apt_jax.eval.latents import LatentSpace
from apt_jax.kernels.scope import Scope
from apt_jax.models.presets import make_generator
from apt_jax.parallel.context import on_mesh
from apt_jax.parallel.mesh import check_model, make_mesh
from apt_jax.parallel.sharding import infer_shardings
from apt_jax.paths import given_path
from apt_jax.samples import Samples, number, save, show, texts, whole, writable
from apt_jax.serve import Server, server_of
from apt_jax.weights import generator_card, load_generator, open_generator

__all__ = ["Generator", "Samples", "load", "save", "show", "writable"]

MOST_SIDE = 16_384  # frames, height or width of a sample: beyond is a slip of the keyboard
MOST_SAMPLES = 1_000_000


def load(path: str | Path = "bundled:base", weights: str = "ema",
         base: str | Path | None = None, *, mesh: Mapping[str, int] | None = None,
         tiled: bool = False) -> Generator:
    """Loads a generator.

    Args:
      path: "bundled:base", a run folder, a component folder that `apt-jax convert import` wrote, or
        a folder with model.safetensors and config.json.
      weights: "ema" (what the paper samples from) or "raw"; a run folder has both.
      base: component folder with the VAE and the text encoder of a generator of latents; None
        follows the run's config to where it began.
      mesh: sizes as in config.mesh, e.g. {"context": 8}, to sample on all devices; None uses one.
      tiled: decode latents in blended tiles of 256 pixels, as diffusers' enable_tiling does: less
        memory, and slightly other pixels. Not with a mesh.

    Raises UserError if there is nothing to load or it does not fit.
    """
    devices = shardings = None
    path, base = given_path("path", path), base if base is None else given_path("base", base)
    if weights == "raw" and generator_card(path):  # a run has none
        raise UserError(f"{path} has one set of weights; 'raw' and 'ema' are those of a run")
    if mesh is not None:
        if not isinstance(mesh, Mapping):
            raise UserError(f"mesh = {mesh!r:.60} is no table of sizes; give one such as "
                            "{'context': 8}")
        mesh = {axis: whole(f"mesh[{axis!r}]", size) for axis, size in mesh.items()}
        if unknown := sorted(set(mesh) - set(base_config().mesh)):
            raise UserError(f"mesh has no {unknown[0]!r}; its sizes are "
                            f"{', '.join(base_config().mesh)}")
        if tiled:
            raise UserError("tiled decoding runs on one device; leave out tiled or mesh")
        devices, model = make_mesh(mesh), _model_of(path)
        check_model(devices, model, ulysses=mesh.get("ulysses", -1))
        shardings = infer_shardings(make_generator(model).abstract(), devices)
    model, params = load_generator(path, weights, shardings)
    if base is not None and model["in_channels"] == 3:
        raise UserError(f"{path} makes pixels, which need no VAE; leave out base = {base!r}")
    return Generator(model, params, _settings(path), source=path, weights=weights,
                     base=history(path).base if base is None else base, tiled=tiled,
                     scope=devices and on_mesh(devices, mesh.get("ulysses", -1)))


def _model_of(path: str | Path) -> Any:
    """config.model of what lies at `path`, before its weights are read."""
    if not str(path).startswith("bundled:") and (Path(path) / "checkpoints").is_dir():
        return load_kept(Path(path) / "config.json").model
    with open_generator(path) as (model, _):
        return model


def _settings(path: str | Path) -> ml_collections.ConfigDict:
    """A whole config: that of the run, or the defaults and what a weights folder says of itself."""
    from importlib import resources

    text = str(path)
    if text.startswith("bundled:"):
        folder = resources.files("apt_jax") / "assets" / text.removeprefix("bundled:")
    else:
        folder = Path(path)
        if (folder / "checkpoints").is_dir() and not (folder / "model.safetensors").is_file():
            return load_kept(folder / "config.json")
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = {group: {key: tuple(value) if isinstance(value, list) else value
                    for key, value in card[group].items()}
            if isinstance(card[group], dict) else card[group]
            for group in ("model", "data", "sample") if card.get(group) is not None}
    check_kept(said, list(said), str(folder / "config.json"))
    config = base_config()
    if (card.get("model") or {}).get("in_channels") != 3:  # latents of a size that is not known
        config.data.height = config.data.width = 0
        config.data.max_text_tokens = 512
    for group in ("data", "sample"):
        for key, value in said.get(group, {}).items():
            if key in config[group]:
                config[group][key] = value
    return config


class Generator:
    """A velocity network with its weights: prompts in, pictures or clips out.

    Attributes: model (config.model), params (nested dict of arrays), config (whole ConfigDict:
    default size, guidance and so on), source, weights, latents (the VAE and text encoder of a
    generator of latents, None for one of pixels).
    """

    def __init__(self, model: Any, params: Any, config: ml_collections.ConfigDict | None = None,
                 source: str = "", weights: str = "ema", base: str | Path | None = None,
                 scope: Scope | None = None, tiled: bool = False, attention: str = "auto"):
        """scope: how samples lie on a mesh (`parallel.context.on_mesh`), None for one device;
        attention: the kernel by name."""
        self.model = model
        self.latents = None
        if base is not None and model["in_channels"] != 3:
            self.latents = LatentSpace(Path(base), model["dtype"], tiled=tiled,
                                       devices=scope and scope.mesh.devices)
        self.config = config if config is not None else base_config()
        self.source, self.weights = source, weights
        # The kernel is the machine's matter: weights trained with one go with any.
        self.network = make_generator({**dict(model), "attention": attention}).on(scope)
        self.params = jax.tree.map(jnp.asarray, params)
        # Weights of one network share what was compiled for it, on one device and without a VAE.
        self._kind = Itself(self.network) if scope is not None or self.latents else json.dumps(
            {**dict(model), "attention": attention}, sort_keys=True)
        self._encoder = self._empty = None

    def __repr__(self) -> str:
        return (f"Generator({self.source!r}, weights={self.weights!r}, "
                f"{self.network.parameter_count() / 1e6:.2f}M parameters)")

    # -- text --------------------------------------------------------------------------------

    def encode(self, prompts: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Text states float32 [N, L, D] and mask bool [N, L]; '' is the empty caption, and a string
        alone is one prompt."""
        prompts = texts(prompts)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"the prompt {prompt!r} is no text; give a string")
            if not is_text(prompt):
                raise UserError(f"the prompt {prompt!r} holds bytes or half a character that are "
                                "no UTF-8; type it again")
        if self._encoder is None:
            from apt_jax.data.captions import TextEncoder

            self._check_base()
            encoder = TextEncoder if self.latents is None else self.latents.text_encoder
            if self.model["text_width"] != encoder.width:
                raise UserError(
                    f"this generator reads text states of width {self.model['text_width']}, the "
                    f"text encoder here ({encoder.name}) gives {encoder.width}; pass "
                    "states of its own encoder to Generator.draw")
            self._encoder = TextEncoder() if encoder is TextEncoder else encoder
        return self._encoder.encode(prompts, self.config.data.max_text_tokens)

    def _no_text(self, text: np.ndarray, mask: np.ndarray, mode: str
                 ) -> tuple[np.ndarray, np.ndarray]:
        """States [L, D] and mask [L] of the empty caption beside these; only euler reads them."""
        if mode != "euler":
            return np.zeros_like(text[0]), np.zeros_like(mask[0])
        if self._empty is None:
            text, mask = self.encode([""])
            self._empty = text[0], mask[0]
        return self._empty

    def _check_base(self) -> None:
        if self.model["in_channels"] != 3 and self.latents is None:
            raise UserError(f"this generator makes latents of {self.model['in_channels']} channels; "
                            "name the component folder with its VAE and text encoder as base")

    # -- sampling ----------------------------------------------------------------------------

    def sample(self, prompts: str | Sequence[str], mode: str = "one_step", seed: int = 0, *,
               count: int = 1, frames: int | None = None, height: int | None = None,
               width: int | None = None, steps: int | None = None,
               guidance: float | None = None, time: float | None = None,
               fresh_noise: bool | None = None, batch: int | None = None, timing: int = 0,
               negative: str = "", label: str = "", latents: bool = False) -> Samples:
        """Draws `count` samples of every prompt.

        Sample i starts from noise of (seed, i), whatever the mode, the weights and the batch: the
        same seed compares samplers and checkpoints on the same noise.

        Args:
          prompts: one caption or several.
          mode: "one_step" (Eq. 3-5), "two_step", or "euler" (the diffusion sampler, guided).
          frames, height, width: pixels of a sample; by default what the generator was trained on.
          steps, guidance: of euler; by default the config's `sample` group.
          time, fresh_noise: of two_step: t between the steps, and new noise for the second.
          batch: most samples per forward pass; by default 64, of latents 1.
          timing: draw a batch so often again and keep the median time in `.seconds`.
          negative: the guidance's negative prompt, of euler.
          label: names a progress line on stderr; empty shows none.
          latents: keep the noise and the latents of every sample too.

        Returns Samples, N = len(prompts) * count, the samples of a prompt side by side.
        Raises UserError for settings that do not fit the mode or the network.
        """
        prompts = texts(prompts)
        if not 1 <= whole("count", count) * len(prompts) <= MOST_SAMPLES:
            raise UserError(f"count = {count} of {len(prompts)} prompts must be 1 to {MOST_SAMPLES:,} "
                            "samples; draw more in several calls")
        check_mode(mode, negative=negative)
        captions = tuple(prompt for prompt in prompts for _ in range(count))
        rows = np.repeat(np.arange(len(prompts)), count)
        if negative != "":
            text, mask = self.encode([*prompts, negative])
            null = text[-1], mask[-1]
        else:  # alone: a warning of long captions counts those that the user gave
            text, mask = self.encode(prompts)
            null = self._no_text(text, mask, mode)
        return self.draw(text[rows], mask[rows], captions, null=null, mode=mode,
                         seed=seed, frames=frames, height=height, width=width, steps=steps,
                         guidance=guidance, time=time, fresh_noise=fresh_noise, batch=batch,
                         timing=timing, label=label, latents=latents)

    def draw(self, text: np.ndarray, text_mask: np.ndarray, captions: Sequence[str], *,
             null: tuple[np.ndarray, np.ndarray], mode: str = "one_step", seed: int = 0,
             frames: int | None = None, height: int | None = None, width: int | None = None,
             steps: int | None = None, guidance: float | None = None, time: float | None = None,
             fresh_noise: bool | None = None, batch: int | None = None, timing: int = 0,
             label: str = "", latents: bool = False) -> Samples:
        """`sample` from text states: text float [N, L, D], text_mask bool [N, L], null [L, D], [L].

        label: names a progress line on stderr; empty shows none.
        """
        settings = self._resolve(mode, seed, frames, height, width, steps, guidance, time,
                                 fresh_noise)
        shape, decoder = self._shape(settings), self.latents and self.latents.decoder
        most = (64 if self.latents is None else 1) if batch is None else whole("batch", batch)
        if whole("timing", timing) < 0:
            raise UserError(f"timing = {timing} must be at least 0")
        size = min(most, max(1, len(text)))
        generation = self._generation(settings, size)

        def forward(rows: slice, label: str = "", kept: list | None = None) -> np.ndarray:
            return generation(
                self.params, np.asarray(text[rows], np.float32), np.asarray(text_mask[rows], bool),
                shape, seed=seed, guidance=settings.get("guidance", 1.0), time=settings.get("time"),
                null_text=np.asarray(null[0], np.float32), null_mask=np.asarray(null[1], bool),
                label=label, decoder=decoder, kept=kept)

        kept: list[np.ndarray] | None = [] if latents else None
        pixels = forward(slice(None), label, kept)
        settings |= {"batch": size, "sampling_seconds": round(generation.seconds, 4)}
        laps = []
        for _ in range(timing):
            forward(slice(size))
            laps.append(generation.seconds)
        found = Samples(pixels, tuple(captions), settings,
                        statistics.median(laps) if laps else None)
        if kept is None:
            return found
        noise = np.asarray(sample_noise(seed, jnp.arange(len(text)), shape))
        return dataclasses.replace(found, noise=noise, latents=np.concatenate(kept))

    def server(self, **options: Any) -> Server:
        """One-step generation of one size, compiled ahead of time: `serve.server_of`'s options."""
        return server_of(self, **options)

    def default_size(self) -> tuple[int, int, int]:
        """(frames, height, width) in pixels, as trained; 0 where the checkpoint does not say."""
        self._check_base()
        data = self.config.data
        return ((max(data.frames), data.height, data.width) if self.latents is None
                else self.latents.default_size(data))

    def sample_shape(self, **sizes: int | None) -> tuple[int, int, int, int]:
        """(F, H, W, C) that the network makes for frames, height, width in pixels."""
        names = ("frames", "height", "width")
        if unknown := sorted(set(sizes) - set(names)):
            raise TypeError(f"sample_shape() takes {', '.join(names)}, not {unknown[0]!r}")
        return self._shape(self._resolve("one_step", 0, *map(sizes.get, names), *[None] * 4))

    def check(self, mode: str, seed: int = 0, **settings: Any) -> None:
        """UserError where `draw` would refuse these settings, without any work."""
        names = ("frames", "height", "width", "steps", "guidance", "time", "fresh_noise")
        self._shape(self._resolve(mode, seed, *map(settings.get, names)))

    def _shape(self, settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
        size = tuple(settings[side] for side in ("frames", "height", "width"))
        if self.latents is None:
            return *size, self.model["in_channels"]
        return self.latents.shape(self.model, *size)

    def _resolve(self, mode, seed, frames, height, width, steps, guidance, time, fresh_noise
                 ) -> dict[str, Any]:
        """All settings of a call with their defaults, checked."""
        check_mode(mode, steps=steps, guidance=guidance, time=time, fresh_noise=fresh_noise)
        sizes, sample = self.default_size(), self.config.sample
        settings: dict[str, Any] = {
            "checkpoint": self.source, "weights": self.weights, "mode": mode,
            "seed": whole("seed", seed),
            "frames": sizes[0] if frames is None else whole("frames", frames),
            "height": sizes[1] if height is None else whole("height", height),
            "width": sizes[2] if width is None else whole("width", width),
            "shift": float(sample.shift),  # runs from before the field say no rate
            "fps": media.frame_rate(sample.get("fps", 0.0), self.latents is not None),
        }
        if mode == "euler":
            settings["steps"] = whole("steps", sample.steps if steps is None else steps)
            settings["guidance"] = number("guidance", sample.guidance if guidance is None else guidance)
        if mode == "two_step":
            settings["time"] = number("time", sample.two_step_time if time is None else time)
            settings["fresh_noise"] = bool(
                sample.two_step_fresh if fresh_noise is None else fresh_noise)
        check_sampling(settings)
        for name, patch in zip(("frames", "height", "width"), self.model["patch"]):
            size = settings[name]
            given = {"frames": frames, "height": height, "width": width}[name] is not None
            if size < 1 and not given:
                raise UserError(f"{name} = {size}: the size of a sample is not known; give "
                                "frames, height and width")
            if not 1 <= size <= MOST_SIDE:
                raise UserError(f"{name} = {size} must be 1 to {MOST_SIDE:,}")
            if self.latents is None and size % patch:
                raise UserError(f"{name} = {size} is not a multiple of the network's patch {patch}")
        return settings

    def _generation(self, settings: dict[str, Any], batch: int) -> Generation:
        """The sampler of these settings, compiled at most once per shape of its inputs."""
        known = {"steps": "steps", "shift": "shift", "fresh_noise": "two_step_fresh"}
        options = {name: settings[key] for key, name in known.items() if key in settings}
        return generation_of(self._kind, settings["mode"], batch, tuple(sorted(options.items())))
