"""Sharpness: how strongly neighbouring pixels differ. Blur lowers it, noise raises it."""

import numpy as np


def sharpness(frames: np.ndarray) -> float:
    """Mean absolute spatial gradient of frames uint8 [..., H, W, 3], in [0, 1] units per pixel.

    The mean over frames, pixels and the three RGB channels of the absolute forward difference,
    horizontal and vertical averaged with equal weight. It says nothing by itself: compare it with
    the data's at the same size.
    """
    total, batch = 0.0, 4096  # in pieces: the int16 copies of a large set need not fit at once
    flat = frames.reshape(-1, *frames.shape[-3:])
    for start in range(0, len(flat), batch):
        x = flat[start:start + batch].astype(np.int16)
        vertical = np.abs(np.diff(x, axis=1)).mean(dtype=np.float64)
        horizontal = np.abs(np.diff(x, axis=2)).mean(dtype=np.float64)
        total += (vertical + horizontal) / 2 * len(x)
    return float(total / max(len(flat), 1) / 255.0)
