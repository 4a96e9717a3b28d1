"""Frechet distance between Gaussians fitted to features, after a fixed projection.

Heusel et al., "GANs trained by a two time-scale update rule" (NeurIPS 2017), equation 6. A
covariance of 1280 dimensions needs far more pictures than a small data set has, so features are
first projected on the principal components of the *whole* training reference (`Projection`, 128 of
them). The projection is fitted once, on real data only. Distances may be compared only where they
were measured against the same data in as many dimensions (`measure.Reference.hash`).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
from safetensors import safe_open
from safetensors.numpy import save_file

from apt_jax.errors import UserError


@dataclass(frozen=True)
class Projection:
    """The affine map features -> (features - mean) @ components.

    mean float32 [D], components float32 [D, K] with orthonormal columns, largest variance first.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, dim: int = 128) -> "Projection":
        """Principal components of features [N, D], in float64; the sign of each is fixed.

        Raises UserError where N is below 2 * dim: the components would be noise.
        """
        check_enough(len(features), dim, "reference features")
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        x = x - mean
        if len(x) < x.shape[1]:
            components = np.linalg.svd(x, full_matrices=False)[2][:dim].T
        else:  # only the leading ones: a third of the time of all
            last = x.shape[1] - 1
            covariance = x.T @ x / (len(x) - 1)
            _, vectors = scipy.linalg.eigh(covariance, subset_by_index=[last - dim + 1, last])
            components = vectors[:, ::-1]  # eigh gives them ascending
        largest = np.abs(components).argmax(0)
        components = components * np.sign(components[largest, np.arange(dim)])
        return cls(mean.astype(np.float32), components.astype(np.float32))

    @property
    def dim(self) -> int:
        return self.components.shape[1]

    @property
    def hash(self) -> str:
        """sha256 over both arrays, to tell an altered file. Fitted anew on another machine the same
        data give the same space and another hash: eigenvectors are not exact in their last bits."""
        digest = hashlib.sha256(np.ascontiguousarray(self.mean).tobytes())
        digest.update(np.ascontiguousarray(self.components).tobytes())
        return digest.hexdigest()

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """features [N, D] -> float64 [N, K]."""
        x = np.asarray(features, np.float64) - self.mean.astype(np.float64)
        return x @ self.components.astype(np.float64)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file with the hash in its metadata."""
        tensors = {"mean": self.mean, "components": np.ascontiguousarray(self.components)}
        save_file(tensors, path, metadata={"sha256": self.hash})

    @classmethod
    def load(cls, path: Path | str) -> "Projection":
        """Read what `save` wrote; raises UserError where the arrays do not fit the hash."""
        with safe_open(path, framework="numpy") as file:
            projection = cls(file.get_tensor("mean"), file.get_tensor("components"))
            if (file.metadata() or {}).get("sha256") != projection.hash:
                raise UserError(
                    f"{path} was altered: its hash does not fit; fit the projection anew")
        return projection


@dataclass(frozen=True)
class Moments:
    """Mean [K], covariance [K, K] (both float64) of n samples."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int

    @classmethod
    def of(cls, features: np.ndarray, what: str = "samples") -> "Moments":
        """Moments of features [N, K]; raises UserError where N < 2 K."""
        check_enough(len(features), features.shape[1], what)
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        x = x - mean
        return cls(mean, x.T @ x / (len(x) - 1), len(features))


def check_enough(n: int, dim: int, what: str) -> None:
    """UserError where n features are too few for moments in `dim` dimensions."""
    if n < 2 * dim:
        raise UserError(
            f"{n} {what} are too few for a Frechet distance in {dim} dimensions; "
            f"give at least {2 * dim}, use fewer dimensions, or report the kernel distance instead")


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64.

    The product under the root is symmetric, so its root's trace is a sum over real eigenvalues; the
    general matrix root of A B that is often used has complex round-off to throw away.
    """
    root = _symmetric_sqrt(a.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross
    return float(max(distance, 0.0))  # equal moments may give -1e-12


def _symmetric_sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
