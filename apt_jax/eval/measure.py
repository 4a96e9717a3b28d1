"""Measure samples against real data: one reference, one call per set of samples.

    reference = Reference.build(real_frames)  # uint8 [M, F, H, W, 3]
    measure(sample_frames, reference)         # {"fd": ..., "sharpness": ..., "n": ...}
    floor(reference)                          # what real data scores against itself

Frames F = 1 are pictures. For clips "fd" takes every frame as a picture, "fd_motion" the
differences of neighbouring frames (video.py), and n counts clips.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from apt_jax.errors import UserError
from apt_jax.eval import mobilenet
from apt_jax.eval.frechet import Moments, Projection, frechet_distance
from apt_jax.eval.sharpness import sharpness
from apt_jax.eval.video import motion_features

DIM = 128


def clip_features(frames: np.ndarray, extract=None, label: str = "") -> np.ndarray:
    """Features of clips: uint8 [N, F, H, W, 3] -> float32 [N, F, 1280].

    extract: a MobileNetFeatures to reuse. All frames go through in one stream of full batches.
    """
    frames = np.asarray(frames)
    if frames.ndim != 5:
        raise UserError(f"clips are [N, F, H, W, 3], got {frames.shape}; images have F = 1")
    extract = extract or mobilenet.MobileNetFeatures()
    flat = extract(frames.reshape(-1, *frames.shape[2:]), label)
    return flat.reshape(*frames.shape[:2], -1)


@dataclass(frozen=True)
class Reference:
    """Real data ready to measure against.

    frames uint8 [M, F, H, W, 3]; features float32 [M, F, 1280]; projection fitted on all frames'
    features; motion on all frame differences (None for pictures).
    """

    frames: np.ndarray
    features: np.ndarray
    projection: Projection
    motion: Projection | None

    @classmethod
    def build(cls, frames: np.ndarray, dim: int = DIM, cache_dir: Path | str | None = None,
              extract=None, label: str = "features of the data") -> "Reference":
        """Compute features and projections, or read them from cache_dir.

        The cache file is named by a hash of the frames, the network and dim, so other data never
        meets a stale one. Raises UserError where there are fewer than 2 * dim frames.
        """
        frames = np.ascontiguousarray(frames)
        path = None
        if cache_dir is not None:
            path = _cache_file(cache_dir, frames, dim)
            cached = _read(path)
            if cached is not None:
                return cls(frames, *cached)
        features = clip_features(frames, extract, label)
        projection = Projection.fit(features.reshape(-1, features.shape[-1]), dim)
        motion = Projection.fit(motion_features(features), dim) if frames.shape[1] > 1 else None
        if path is not None:
            _write(path, features, projection, motion)
        return cls(frames, features, projection, motion)

    @cached_property
    def hash(self) -> str:
        """Hash of the frames, the network and dim: distances compare only where it is equal.

        It is exact. The projection's own hash is not: its last bits differ with the machine and
        the number of threads, and move a distance by 1e-12 of itself.
        """
        return _key(self.frames, self.projection.dim)

    @cached_property
    def sharpness(self) -> float:
        return sharpness(self.frames)

    @cached_property
    def moments(self) -> Moments:
        return _moments(self.features, self.projection, "reference frames")

    @cached_property
    def motion_moments(self) -> Moments:
        return Moments.of(self.motion(motion_features(self.features)), "reference frame pairs")


def known_features(frames: np.ndarray, cache_dir: Path | str, dim: int = DIM) -> np.ndarray | None:
    """float32 [N, F, 1280] where `Reference.build` left those of these frames, else None."""
    cached = _read(_cache_file(cache_dir, frames, dim))
    return None if cached is None else cached[0]


def measure(frames: np.ndarray, reference: Reference, extract=None, label: str = "",
            features: np.ndarray | None = None) -> dict:
    """Distance and sharpness of samples uint8 [N, F, H, W, 3].

    Returns {"fd", "sharpness", "sharpness_ratio" (to the data's), "n", "frames", "dim",
    "reference" (hash)} and, where F > 1, "fd_motion". `features` [N, F, 1280] may be given where
    they are known. Raises UserError where the size differs from the reference's or n is too small.
    """
    frames = np.asarray(frames)
    if frames.shape[1:] != reference.frames.shape[1:]:
        raise UserError(
            f"samples are {frames.shape[1:]} (frames, height, width, channels) and the reference "
            f"{reference.frames.shape[1:]}; measure both at one size")
    if features is None:
        features = clip_features(frames, extract, label)
    result = {
        "fd": frechet_distance(
            _moments(features, reference.projection, "sample frames"), reference.moments),
        "sharpness": sharpness(frames),
        "n": len(frames),
        "frames": frames.shape[1],
        "dim": reference.projection.dim,
        "reference": reference.hash,
    }
    result["sharpness_ratio"] = result["sharpness"] / max(reference.sharpness, 1e-12)
    if reference.motion is not None:
        pairs = Moments.of(reference.motion(motion_features(features)), "sample frame pairs")
        result["fd_motion"] = frechet_distance(pairs, reference.motion_moments)
    return result


def floor(reference: Reference, splits: int = 4, seed: int = 0) -> dict:
    """Real against real: FD between two random disjoint halves, the mean over `splits` splits.

    Returns {"fd", "fd_low", "fd_high" (smallest and largest split), "sharpness", "n" (real samples
    in both halves together), "halves" (what each distance is measured with), "splits", "frames",
    "dim", "reference"} and "fd_motion" for clips. Clips are split whole.

    An FD is biased upwards, the more the fewer samples it has: the floor of halves lies above what
    as many real samples as the data has would score, and a good generator's FD, measured with all,
    may lie below it. Tables therefore show the size of a half (eval/table.py).
    """
    rng = np.random.default_rng(seed)
    total = len(reference.features)
    half = total // 2
    distances, motions = [], []
    for _ in range(splits):
        order = rng.permutation(total)
        a, b = reference.features[order[:half]], reference.features[order[half:]]
        distances.append(frechet_distance(
            *(_moments(x, reference.projection, "frames in a half of the data") for x in (a, b))))
        if reference.motion is not None:
            motions.append(frechet_distance(*(
                Moments.of(reference.motion(motion_features(x)), "frame pairs in half the data")
                for x in (a, b))))
    result = {
        "fd": float(np.mean(distances)), "fd_low": min(distances), "fd_high": max(distances),
        "sharpness": reference.sharpness, "sharpness_ratio": 1.0,
        "n": total, "halves": [half, total - half], "splits": splits,
        "frames": reference.frames.shape[1], "dim": reference.projection.dim,
        "reference": reference.hash,
    }
    if motions:
        result["fd_motion"] = float(np.mean(motions))
    return result


def _moments(features: np.ndarray, projection: Projection, what: str) -> Moments:
    return Moments.of(projection(features.reshape(-1, features.shape[-1])), what)


def _cache_file(cache_dir: Path | str, frames: np.ndarray, dim: int) -> Path:
    return Path(cache_dir) / f"reference_{_key(frames, dim)}.safetensors"


def _key(frames: np.ndarray, dim: int) -> str:
    frames = np.ascontiguousarray(frames)
    digest = hashlib.sha256(f"{mobilenet.identity()} {frames.shape} {frames.dtype} {dim}".encode())
    digest.update(frames.data)
    return digest.hexdigest()[:24]


def _read(path: Path) -> tuple[np.ndarray, Projection, Projection | None] | None:
    """What `_write` wrote, or None where there is no whole file (it is then made anew)."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except SafetensorError:
        return None
    projections = [
        Projection(tensors[f"{name}/mean"], tensors[f"{name}/components"])
        if f"{name}/mean" in tensors else None for name in ("projection", "motion")]
    return tensors["features"], projections[0], projections[1]


def _write(path: Path, features: np.ndarray, projection: Projection,
           motion: Projection | None) -> None:
    tensors = {"features": features}
    for name, value in (("projection", projection), ("motion", motion)):
        if value is not None:
            tensors[f"{name}/mean"] = value.mean
            tensors[f"{name}/components"] = np.ascontiguousarray(value.components)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, partial)
    os.replace(partial, path)
