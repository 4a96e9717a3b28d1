"""Samples on disk: one npz with `frames` uint8 [N, F, H, W, 3] and `captions` [N]."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apt_jax.errors import UserError


class SampleSet(NamedTuple):
    """frames uint8 [N, F, H, W, 3]; captions, N strings."""

    frames: np.ndarray
    captions: list[str]


def save_samples(path: Path | str, frames: np.ndarray, captions: Sequence[str]) -> Path:
    """Write a sample file, whole or not at all. Raises UserError for a wrong shape or count."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise UserError(f"samples are uint8 [N, F, H, W, 3], got {frames.dtype} {frames.shape}; "
                        "convert with apt_jax.media.to_uint8")
    if len(captions) != len(frames):
        raise UserError(f"{len(frames)} samples and {len(captions)} captions; give one for each")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:  # a file object: savez would append .npz to a path
        # Unicode, not object: an object array would be a pickle.
        np.savez_compressed(file, frames=frames, captions=np.array(captions, dtype=np.str_))
    os.replace(partial, path)
    return path


def load_samples(path: Path | str) -> SampleSet:
    """Read what `save_samples` wrote. Raises UserError for anything else; never unpickles."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no sample file {path}; apt-jax evaluate --checkpoint writes one, "
                        "samples.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            frames, captions = file["frames"], file["captions"]
    except (KeyError, ValueError, TypeError, RuntimeError, OSError, EOFError, MemoryError,
            zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is no sample file ({error}); it needs the arrays frames and "
                        "captions, both without pickles") from None
    if (frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3
            or 0 in frames.shape or captions.shape != frames.shape[:1]):
        raise UserError(f"{path} holds frames {frames.dtype} {frames.shape} and captions "
                        f"{captions.shape}; expected uint8 [N, F, H, W, 3] and N captions")
    return SampleSet(frames, [str(text) for text in captions])
