"""Evaluate a generator: FD and sharpness on training captions, KID on held-out ones.

A Frechet distance needs more pictures than a held-out fifth of a small data set has, so it is
measured on training captions; the kernel distance is unbiased at any size and measures the held-out
ones.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from apt_jax.data.pipeline import load_all, open_dataset
from apt_jax.errors import UserError
from apt_jax.eval.generate import check_sampling
from apt_jax.eval.kernel_distance import kernel_distance
from apt_jax.eval.measure import DIM, Reference, clip_features, floor, measure
from apt_jax.eval.mobilenet import FEATURES, MobileNetFeatures
from apt_jax.eval.samples import SampleSet

HELD_OUT = "holdout"
log = logging.getLogger(__name__)


class Split(NamedTuple):
    """A split in memory: frames uint8 [N, F, H, W, 3], captions, text [N, L, D], mask [N, L].

    null: text [L, D] and mask [L] of the empty caption.
    """

    frames: np.ndarray
    captions: list[str]
    text: np.ndarray
    mask: np.ndarray
    null: tuple[np.ndarray, np.ndarray]


def load_split(path: str, split: str, frames: int, height: int, width: int,
               max_text_tokens: int = 16, frame_stride: int = 1) -> Split:
    """Load one split of a prepared data set in one shape; `frame_stride` as config.data has it."""
    dataset = open_dataset(path, split, (frames,), height, width, frame_stride, max_text_tokens)
    return Split(*load_all(dataset), (dataset.null_text, dataset.null_mask))


def load_held_out(path: str, split: str, frames: int, height: int, width: int,
                  max_text_tokens: int = 16, frame_stride: int = 1
                  ) -> tuple[Split | None, list[str]]:
    """The split for the kernel distance, or None and a line that says why there is none.

    "" asks for none. Data may have been prepared without the default, HELD_OUT, or with nothing of
    this length in it; any other name that cannot be loaded is a UserError.
    """
    if not split:
        return None, []
    try:
        return load_split(path, split, frames, height, width, max_text_tokens, frame_stride), []
    except UserError as error:
        if split != HELD_OUT:
            raise
        return None, [f"KID is left out: {error}. Name a split with --held-out, or '' for none."]


def draw(generator, split: Split, count: int, label: str, **settings) -> tuple[SampleSet, dict]:
    """`count` samples (0: one per caption; more go round) of an api.Generator for a split.

    Returns the samples and the settings they were made with.
    """
    rows = np.arange(count or len(split.captions)) % len(split.captions)
    _, frames, height, width, _ = split.frames.shape
    samples = generator.draw(
        split.text[rows], split.mask[rows], [split.captions[i] for i in rows], null=split.null,
        frames=frames, height=height, width=width, label=label, **settings)
    return SampleSet(samples.frames, list(samples.captions)), samples.settings


def check_counts(count: int = 0, dim: int = DIM, batch: int = 1) -> None:
    """UserError for a number of samples, dimensions or samples at a time that cannot be."""
    for name, value, least in (("count", count, 0), ("dim", dim, 1), ("batch", batch, 1)):
        if value < least:
            raise UserError(f"{name} = {value} must be at least {least}")
    if dim > FEATURES:
        raise UserError(f"dim = {dim} is more than the features have; give at most {FEATURES}")


def check_sizes(real: int, samples: int, frames: int, dim: int, mend: str) -> None:
    """UserError where so many clips of so many frames give no Frechet distance, before any work.

    mend: what is done about too few samples; "{}" in it is how many there must be.
    """
    each = max(1, frames - 1)  # of a clip every frame counts, and every pair of them
    unit = "frame pairs" if frames > 1 else "frames"
    needed = -(-2 * dim // each)
    for count, what, more in (
            (real, f"{unit} of the data", f"take at least {needed:,} records"),
            (samples, f"sample {unit}", mend.format(f"{needed:,}"))):
        most = count * each // 2
        if most < dim:
            lower = f", or lower --dim to at most {most}" if most else ""
            raise UserError(f"{count * each:,} {what} are too few for a Frechet distance in {dim} "
                            f"dimensions, which takes {2 * dim}; {more}{lower}")


def floor_line(real: np.ndarray, dim: int) -> str:
    """Why "real against real" cannot be measured on frames [N, F, ...]; "" where it can."""
    half, each = len(real) // 2, max(1, real.shape[1] - 1)
    if half * each >= 2 * dim:
        return ""
    return (f"Real against real is left out: half of the data, {half:,} records, is too few for a "
            f"Frechet distance in {dim} dimensions; --dim of at most {half * each // 2} has it.")


def held_out_line(held_out: Split | None) -> str:
    """Why the kernel distance to held-out records cannot be measured; "" where it can."""
    if held_out is None or len(held_out.captions) > 1:
        return ""
    return ("KID is left out: it needs two held-out records and the split has "
            f"{len(held_out.captions)}; name another with --held-out, or '' for none.")


def evaluate_generator(generator, train: Split, held_out: Split | None, *, mode: str,
                       guidance: Sequence[float] = (), count: int = 0, seed: int = 0,
                       dim: int = DIM, cache_dir=None,
                       keep: Callable[[dict, SampleSet], None] | None = None,
                       left_out: Sequence[str] = (), **settings) -> tuple[dict, SampleSet]:
    """Sample, measure, and choose the best guidance.

    guidance: values to try for mode "euler" (none: the config's). All values' results are returned
    under "sweep"; the lowest FD is the result. settings go to `Generator.draw` (steps, time,
    fresh_noise, batch). keep(result, samples) is called after every value with the best so far, so
    that a stop loses one value only. left_out: lines on parts that the caller left out, for the
    result. Returns the JSON-ready result and the winning samples. UserError, before anything is
    drawn, where the FD cannot be measured; a part that cannot be is None and "left_out" says why.
    """
    if train.text.shape[-1] != generator.model["text_width"]:
        raise UserError(
            f"the data's text states are {train.text.shape[-1]} wide and the generator reads "
            f"{generator.model['text_width']}; evaluate on data prepared with its text encoder")
    if guidance and mode != "euler":
        raise UserError(f"--guidance belongs to mode 'euler', not {mode!r}; drop it")
    batch = settings.get("batch")
    check_counts(count, dim, 1 if batch is None else batch)
    for value in guidance or (1.0,):
        check_sampling({"guidance": value, "seed": seed})
    n, frames = train.frames.shape[:2]
    check_sizes(n, count or n, frames, dim, "raise --count to {}")
    lines = [*left_out, *filter(None, (floor_line(train.frames, dim), held_out_line(held_out)))]
    for line in lines:
        log.warning("%s", line)
    extract = MobileNetFeatures()
    reference = Reference.build(train.frames, dim, cache_dir, extract)
    result = {"settings": {}, "floor": _floor(reference), "train": {}, "left_out": lines}
    values, entries, samples = list(guidance or (None,)), [], None
    for at, value in enumerate(values):
        name = mode if value is None else f"{mode}, guidance {value:g}"
        drawn, used = draw(generator, train, count, name, mode=mode, guidance=value, seed=seed,
                           **settings)
        entry = measure(drawn.frames, reference, extract, f"features of {name}")
        entry["seconds"] = used.get("sampling_seconds")
        if "guidance" in used:
            entry["guidance"] = used["guidance"]
        entries.append(entry)
        if samples is None or entry["fd"] < result["train"]["fd"]:
            result |= {"settings": used, "train": entry}
            samples = drawn
        if len(values) > 1:
            result["sweep"] = list(entries)
        if keep is not None:
            rest = ", ".join(f"{value:g}" for value in values[at + 1:])
            open_ = [f"Not finished: guidance {rest} was not tried."] * bool(rest)
            if held_out is not None and not held_out_line(held_out):
                open_ += ["Not finished: KID was not measured."]
            keep(result | {"left_out": lines + open_}, samples)
    if held_out is not None:
        result["held_out"] = None
    if held_out is not None and not held_out_line(held_out):
        best = result["train"]
        options = dict(settings) | ({"guidance": best["guidance"]} if "guidance" in best else {})
        fresh, _ = draw(generator, held_out, 0, "held-out captions", mode=mode, seed=seed,
                        **options)
        # One row per clip, the mean of its frames: frames of a clip are no independent samples.
        ours, real = (clip_features(x, extract).mean(1) for x in (fresh.frames, held_out.frames))
        result["held_out"] = kernel_distance(ours, real).as_dict()
    return result, samples


def evaluate_samples(samples: SampleSet, real: Split, dim: int = DIM, cache_dir=None) -> dict:
    """Measure an existing sample file against a split of the same shape.

    UserError, before any work, where the FD cannot be measured; the floor is None where only that
    cannot be, and "left_out" says why.
    """
    check_counts(dim=dim)
    n, frames = samples.frames.shape[:2]
    check_sizes(len(real.frames), n, frames, dim, "give at least {} samples")
    lines = [line for line in (floor_line(real.frames, dim),) if line]
    for line in lines:
        log.warning("%s", line)
    extract = MobileNetFeatures()
    reference = Reference.build(real.frames, dim, cache_dir, extract)
    entry = measure(samples.frames, reference, extract, "features of the samples")
    return {"floor": _floor(reference), "train": entry, "left_out": lines}


def _floor(reference: Reference) -> dict | None:
    return None if floor_line(reference.frames, reference.projection.dim) else floor(reference)
