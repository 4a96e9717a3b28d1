"""Draw samples for a measurement: fixed noise per index, so that methods share their seeds."""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.config.load import nearest
from apt_jax.diffusion import samplers
from apt_jax.errors import UserError
from apt_jax.eval.latents import decode_latents
from apt_jax.eval.progress import Progress
from apt_jax.kernels.choice import choosing
from apt_jax.media import to_uint8
from apt_jax.models.presets import make_generator
from apt_jax.models.vae import FrameDecoder
from apt_jax.parallel.flags.options import cpu_options

MODES = ("one_step", "two_step", "euler")
OWNERS = {"steps": "euler", "guidance": "euler", "negative": "euler", "time": "two_step",
          "fresh_noise": "two_step"}  # setting -> the only mode that has it


def check_mode(mode: str, **given) -> None:
    """UserError for an unknown mode and for a setting given (neither None, "" nor False) to
    another mode than its own."""
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}{nearest(str(mode), MODES)}")
    for name, value in given.items():
        if value not in (None, "") and value is not False and mode != OWNERS[name]:
            raise UserError(f"{name} = {value} belongs to mode {OWNERS[name]!r}, not {mode!r}")


MOST_STEPS, MOST_GUIDANCE = 100_000, 1e6  # beyond is a slip of the keyboard


def check_sampling(settings: Mapping[str, float]) -> None:
    """UserError for a seed, steps, guidance or time, where they are given, that cannot be used."""
    if not -(2**31) <= settings.get("seed", 0) < 2**31:  # programs take it as int32
        raise UserError(f"seed = {settings['seed']} does not fit; give one from {-2**31} to "
                        f"{2**31 - 1}")
    if not 1 <= settings.get("steps", 1) <= MOST_STEPS:
        raise UserError(f"steps = {settings['steps']} must be 1 to {MOST_STEPS:,}")
    if not abs(settings.get("guidance", 1.0)) <= MOST_GUIDANCE:
        raise UserError(f"guidance = {settings['guidance']} is no number up to {MOST_GUIDANCE:g}; give "
                        "one such as 3.0")
    if not 0 < settings.get("time", 0.5) < 1:
        raise UserError(f"time = {settings['time']} must lie between 0 and 1")


def sample_noise(seed: int, index: jax.Array, shape: tuple[int, int, int, int],
                 stream: int = 0) -> jax.Array:
    """Unit normal noise float32 [B, *shape], row i a function of (seed, index[i], stream) only.

    Batch size, order and method do not matter, so row i of every method is the same prompt and z.
    """
    key = jax.random.fold_in(jax.random.key(seed), stream)
    keys = jax.vmap(partial(jax.random.fold_in, key))(index)
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


class Generation:
    """One sampler, compiled once per sample shape and used for any number of sets.

    net(params, x, t, text, text_mask) -> velocity. mode: "one_step", "two_step" (two_step_time,
    fresh noise or the same) or "euler" (steps, shift). Guidance and the time between two steps are
    arguments of the call, so a sweep compiles nothing anew. `seconds` is the time of the last call
    without compilation.
    """

    def __init__(self, net: Callable, mode: str, *, steps: int = 25, shift: float = 1.0,
                 two_step_time: float = 0.5, two_step_fresh: bool = False, batch: int = 64):
        if mode not in MODES:
            raise UserError(f"unknown sampling mode {mode!r}; use one of {', '.join(MODES)}")
        if batch < 1:
            raise UserError(f"batch = {batch} must be at least 1")
        self.net, self.mode, self.batch = net, mode, batch
        self.steps, self.shift = steps, shift
        self.two_step_time, self.two_step_fresh = two_step_time, two_step_fresh
        self.seconds = 0.0
        self._warm: set[tuple] = set()  # shapes that were compiled
        self._program = jax.jit(self.draw, static_argnames=("shape",),
                                compiler_options=cpu_options(jax.default_backend()) or None)

    def draw(self, params, index, seed, text, mask, null_text, null_mask, guidance, shape,
             time=None):
        """What is compiled: samples float32 [B, *shape] of rows `index` [B]; see __call__."""
        # On a mesh half as many bytes travel when matrices are cast before they are gathered.
        copy = getattr(self.net, "compute_copy", None)
        velocity = partial(self.net, copy(params) if copy else params)
        z = sample_noise(seed, index, shape)
        with choosing(brief=self.mode != "euler"):  # of a few steps the samples cost less than the program
            return self._sample(velocity, z, index, seed, text, mask, null_text, null_mask, guidance,
                                shape, time)

    def _sample(self, velocity, z, index, seed, text, mask, null_text, null_mask, guidance, shape, time):
        if self.mode == "one_step":
            return samplers.one_step(velocity, z, text, mask)
        if self.mode == "two_step":
            fresh = sample_noise(seed, index, shape, stream=1) if self.two_step_fresh else None
            time = self.two_step_time if time is None else time
            return samplers.two_step(velocity, z, text, mask, time, fresh)
        return samplers.euler(velocity, z, text, mask, null_text, null_mask, steps=self.steps,
                              guidance=guidance, shift=self.shift)

    def __call__(self, params, text: np.ndarray, mask: np.ndarray,
                 shape: tuple[int, int, int, int], *, seed: int = 0, guidance: float = 1.0,
                 null_text: np.ndarray | None = None, null_mask: np.ndarray | None = None,
                 time: float | None = None, first: int = 0, label: str = "",
                 decoder: FrameDecoder | None = None, kept: list[np.ndarray] | None = None
                 ) -> np.ndarray:
        """Samples for text float32 [N, L, D], mask bool [N, L] -> frames uint8 [N, F, H, W, C].

        shape: (F, H, W, C) of one sample; of its latents where a `decoder` makes frames of them,
        whose time then counts. null_text [L, D], null_mask [L]: the negative prompt,
        needed by "euler". time: between two steps, in place of two_step_time. first: index of the
        first sample, for its noise. The last batch is padded. kept: takes the samples before they
        become frames, float32 [n, *shape] a batch. UserError for settings that cannot be used.
        """
        check_sampling({"seed": seed, "guidance": guidance})
        if not len(text):
            raise UserError("there is no caption to draw a sample for; give at least one")
        if self.mode == "euler" and (null_text is None or null_mask is None):
            raise UserError("euler sampling needs null_text and null_mask, the states of the "
                            "empty caption; take them from the data's manifest")
        if null_text is None:
            null_text, null_mask = np.zeros_like(text[0]), np.zeros_like(mask[0])
        shape, total = tuple(int(side) for side in shape), len(text)
        batch = min(self.batch, total)
        time = np.float32(self.two_step_time if time is None else time)
        out = np.empty((total, *(decoder.frame_shape(shape) if decoder else shape)), np.uint8)
        index = np.minimum(np.arange(-(-total // batch) * batch), total - 1)  # padded: the last

        def run(rows):
            return self._program(params, jnp.asarray(rows + first), seed, text[rows], mask[rows],
                                 null_text, null_mask, guidance, shape, time)

        shapes = (batch, shape, text.shape[1:])
        if shapes not in self._warm:  # compile first: it is not part of the sampling time
            x = jax.block_until_ready(run(index[:batch]))
            if decoder:
                decoder(np.asarray(x)[:1])
            self._warm.add(shapes)
        with Progress(total, label, "samples") as progress:
            for start in range(0, total, batch):
                count = min(batch, total - start)
                x = np.asarray(run(index[start:start + batch]))[:count]
                if kept is not None:
                    kept.append(x)
                out[start:start + count] = (
                    decode_latents(decoder, x, label and f"{label}: decoding") if decoder
                    else to_uint8(x))
                progress.advance(count)
            self.seconds = progress.seconds
        return out


class Itself:
    """A key that is equal to itself only; a Network holds dicts and has no hash of its own."""

    def __init__(self, value):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other) -> bool:
        return isinstance(other, Itself) and self.value is other.value


@lru_cache(maxsize=16)
def generation_of(net: Itself | str, mode: str, batch: int, settings: tuple) -> Generation:
    """The sampler of a network, kept with what it compiled.

    net: the network's own key, or config.model as JSON for one that all weights of that network
    share, on one device. settings: ((name, value), ...) of `Generation`.
    """
    net = make_generator(json.loads(net)) if isinstance(net, str) else net.value
    return Generation(net, mode, batch=batch, **dict(settings))


def generate(net: Callable, params, text: np.ndarray, mask: np.ndarray,
             shape: tuple[int, int, int, int], mode: str, seed: int = 0, batch: int = 64,
             guidance: float = 1.0, null_text: np.ndarray | None = None,
             null_mask: np.ndarray | None = None, label: str = "", **settings) -> np.ndarray:
    """One set of samples -> frames uint8 [N, F, H, W, C]; see `Generation` for the arguments.

    Calls with the same network object and settings share one compiled sampler, whatever the
    weights.
    """
    generation = generation_of(Itself(net), mode, batch, tuple(sorted(settings.items())))
    return generation(params, text, mask, shape, seed=seed, guidance=guidance,
                      null_text=null_text, null_mask=null_mask, label=label)
