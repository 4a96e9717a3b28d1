"""Nearest training pictures of a sample, the check against memorisation."""

import numpy as np


def nearest(samples: np.ndarray, reference: np.ndarray, k: int = 3
            ) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of reference [M, D] for each row of samples [N, D], Euclidean.

    Returns indices int64 [N, k] and distances float64 [N, k], nearest first; k is cut to M. For
    clips give one row per clip: the mean of its frames' features.
    """
    x, y = np.asarray(samples, np.float64), np.asarray(reference, np.float64)
    k = min(k, len(y))
    square = (x ** 2).sum(1)[:, None] + (y ** 2).sum(1) - 2.0 * x @ y.T  # [N, M]
    order = np.argsort(square, axis=1, kind="stable")[:, :k]
    distance = np.sqrt(np.clip(np.take_along_axis(square, order, 1), 0.0, None))
    return order, distance
