"""Evaluate a generator: FD and sharpness on training captions, KID on held-out ones.

A Frechet distance needs more pictures than a held-out fifth of a small data set has, so it is
measured on training captions; the kernel distance is unbiased at any size and measures the held-out
ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apt_jax.data.pipeline import load_all, open_dataset
from apt_jax.errors import UserError
from apt_jax.eval.frechet import check_enough
from apt_jax.eval.generate import check_sampling
from apt_jax.eval.kernel_distance import kernel_distance
from apt_jax.eval.measure import DIM, Reference, clip_features, floor, measure
from apt_jax.eval.mobilenet import FEATURES, MobileNetFeatures
from apt_jax.eval.progress import duration
from apt_jax.eval.samples import SampleSet
from apt_jax.eval.table import lay_out


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
               max_text_tokens: int = 16) -> Split:
    """Load one split of a prepared data set in one shape."""
    dataset = open_dataset(path, split, (frames,), height, width, max_text_tokens=max_text_tokens)
    return Split(*load_all(dataset), (dataset.null_text, dataset.null_mask))


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


def evaluate_generator(generator, train: Split, held_out: Split | None, *, mode: str,
                       guidance: Sequence[float] = (), count: int = 0, seed: int = 0,
                       dim: int = DIM, cache_dir=None, **settings) -> tuple[dict, SampleSet]:
    """Sample, measure, and choose the best guidance.

    guidance: values to try for mode "euler" (none: the config's). All values' results are returned
    under "sweep"; the lowest FD is the result. settings go to `Generator.draw` (steps, time,
    fresh_noise, batch). Returns the JSON-ready result and the winning samples.
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
    check_enough((count or n) * max(1, frames - 1), dim, "sample frames")
    extract = MobileNetFeatures()
    reference = Reference.build(train.frames, dim, cache_dir, extract)
    trials = []
    for value in guidance or (None,):
        name = mode if value is None else f"{mode}, guidance {value:g}"
        samples, used = draw(generator, train, count, name, mode=mode, guidance=value, seed=seed,
                             **settings)
        entry = measure(samples.frames, reference, extract, f"features of {name}")
        entry["seconds"] = used.get("sampling_seconds")
        if "guidance" in used:
            entry["guidance"] = used["guidance"]
        trials.append((entry, samples, used))
    best, samples, used = min(trials, key=lambda trial: trial[0]["fd"])
    result = {"settings": used, "floor": floor(reference), "train": best}
    if len(trials) > 1:
        result["sweep"] = [entry for entry, _, _ in trials]
    if held_out is not None:
        options = dict(settings) | ({"guidance": best["guidance"]} if "guidance" in best else {})
        fresh, _ = draw(generator, held_out, 0, "held-out captions", mode=mode, seed=seed,
                        **options)
        # One row per clip, the mean of its frames: frames of a clip are no independent samples.
        ours, real = (clip_features(x, extract).mean(1) for x in (fresh.frames, held_out.frames))
        result["held_out"] = kernel_distance(ours, real).as_dict()
    return result, samples


def evaluate_samples(samples: SampleSet, real: Split, dim: int = DIM, cache_dir=None) -> dict:
    """Measure an existing sample file against a split of the same shape."""
    check_counts(dim=dim)
    n, frames = samples.frames.shape[:2]  # of a clip every frame counts, and every pair of them
    check_enough(n * max(1, frames - 1), dim, "sample frames")
    extract = MobileNetFeatures()
    reference = Reference.build(real.frames, dim, cache_dir, extract)
    entry = measure(samples.frames, reference, extract, "features of the samples")
    return {"floor": floor(reference), "train": entry}


def format_result(result: dict, name: str) -> str:
    """The result as the table that the terminal shows."""
    floor_, best = result["floor"], result["train"]
    motion = "fd_motion" in best
    headings = ["", "FD-MobileNetV2"] + ["motion FD"] * motion + [
        "sharpness to data", "n", "sampling time"]

    def row(label, entry):
        seconds = entry.get("seconds")
        cells = [label, f"{entry['fd']:.1f}"]
        if motion:
            cells.append(f"{entry['fd_motion']:.1f}")
        count = min(entry.get("halves", [entry["n"]]))
        return cells + [f"{entry['sharpness_ratio']:.2f}", f"{count:,}",
                        duration(seconds) if seconds is not None else ""]

    body = [row("real against real", floor_)]
    for entry in result.get("sweep", [best]):
        label = f"{name}, guidance {entry['guidance']:g}" if "guidance" in entry else name
        body.append(row(label + (" (best)" if "sweep" in result and entry is best else ""), entry))
    lines = [lay_out(headings, body), "",
             "Real against real: halves of {:,} and {:,}, whose FD lies above that of all (it "
             "falls with n); ".format(*floor_["halves"]) +
             f"{best['dim']} dimensions, reference {best['reference'][:12]}."]
    if "held_out" in result:
        kid = result["held_out"]
        lines.append(
            f"Held-out captions: KID {1e3 * kid['kid']:.2f} x 1e-3, "
            f"{kid['confidence']:.0%} interval {1e3 * kid['kid_low']:.2f} to "
            f"{1e3 * kid['kid_high']:.2f}, "
            f"{kid['n']:,} samples against {kid['n_reference']:,}.")
    return "\n".join(lines)
