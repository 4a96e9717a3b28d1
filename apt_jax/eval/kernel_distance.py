"""Kernel distance (KID): unbiased squared MMD with a cubic kernel.

Binkowski et al., "Demystifying MMD GANs" (ICLR 2018), section 4: k(x, y) = (x.y / D + 1)^3 on the
raw features. Unlike a Frechet distance its expectation does not depend on the sample count, so it
is what we report on small sets (held-out captions).
"""

from dataclasses import dataclass

import numpy as np

from apt_jax.errors import UserError


@dataclass(frozen=True)
class KernelDistance:
    """Estimate and bootstrap interval of the squared MMD; may be below zero (it is unbiased)."""

    value: float
    low: float
    high: float
    confidence: float
    n: int
    n_reference: int

    def as_dict(self) -> dict:
        return {"kid": self.value, "kid_low": self.low, "kid_high": self.high,
                "confidence": self.confidence, "n": self.n, "n_reference": self.n_reference}


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 for x [N, D], y [M, D] -> float64 [N, M]."""
    product = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
    return (product / x.shape[1] + 1.0) ** 3


def kernel_distance(samples: np.ndarray, reference: np.ndarray, bootstrap: int = 1000,
                    confidence: float = 0.95, seed: int = 0) -> KernelDistance:
    """Unbiased squared MMD of features [N, D] against [M, D] with a percentile bootstrap.

    A resample draws both sets with replacement. Pairs of a picture with its own copy are left out
    of the within-set means, as the diagonal is: counted in, they would push every resample upwards.
    Raises UserError for fewer than two rows on a side.
    """
    if min(len(samples), len(reference)) < 2:
        raise UserError(
            f"a kernel distance needs two samples on each side, got {len(samples)} and "
            f"{len(reference)}; raise the count")
    xx, yy = cubic_kernel(samples, samples), cubic_kernel(reference, reference)
    xy = cubic_kernel(samples, reference)
    np.fill_diagonal(xx, 0.0)
    np.fill_diagonal(yy, 0.0)
    rng = np.random.default_rng(seed)
    n, m = len(xx), len(yy)
    w = rng.multinomial(n, np.full(n, 1 / n), size=bootstrap).astype(np.float64)  # [R, N]
    v = rng.multinomial(m, np.full(m, 1 / m), size=bootstrap).astype(np.float64)  # [R, M]
    draws = _mmd(xx, yy, xy, w, v)
    value = _mmd(xx, yy, xy, np.ones((1, n)), np.ones((1, m)))[0]
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return KernelDistance(float(value), float(low), float(high), confidence, n, m)


def _mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, w: np.ndarray,
         v: np.ndarray) -> np.ndarray:
    """Squared MMD for weights w [R, N], v [R, M]; xx and yy have zero diagonals -> [R]."""
    def within(kernel, weight):
        pairs = weight.sum(1) ** 2 - (weight ** 2).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample of one picture: nan
            return np.einsum("rn,rn->r", weight @ kernel, weight) / pairs

    between = np.einsum("rm,rm->r", w @ xy, v) / (w.sum(1) * v.sum(1))
    return within(xx, w) + within(yy, v) - 2.0 * between
