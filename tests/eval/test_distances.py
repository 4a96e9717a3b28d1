"""Frechet and kernel distance, sharpness, motion and nearest rows against exact answers."""

import numpy as np
import pytest

from apt_jax.errors import UserError
from apt_jax.eval.frechet import Moments, Projection, frechet_distance
from apt_jax.eval.kernel_distance import cubic_kernel, kernel_distance
from apt_jax.eval.nearest import nearest
from apt_jax.eval.sharpness import sharpness
from apt_jax.eval.video import motion_features

RNG = np.random.default_rng


def _covariance(seed, dim=6):
    x = RNG(seed).normal(size=(dim, dim))
    return x @ x.T / dim + 0.1 * np.eye(dim)


def test_frechet_of_commuting_gaussians_in_closed_form():
    basis = np.linalg.qr(RNG(0).normal(size=(6, 6)))[0]
    a, b = np.array([4.0, 1, 9, 0, 2, 1]), np.array([1.0, 1, 4, 3, 0, 5])
    mean = np.array([1.0, 0, -2, 0, 0, 0.5])
    got = frechet_distance(Moments(mean, basis * a @ basis.T, 99),
                           Moments(np.zeros(6), basis * b @ basis.T, 99))
    expected = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    # Both are singular: the root of a round-off of 1e-16 is 1e-8.
    assert got == pytest.approx(expected, rel=1e-7)


def test_frechet_of_general_gaussians_equals_the_matrix_root():
    from scipy.linalg import sqrtm

    a, b = _covariance(1), _covariance(2)
    got = frechet_distance(Moments(np.zeros(6), a, 99), Moments(np.zeros(6), b, 99))
    expected = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert got == pytest.approx(expected, rel=1e-8)


def test_frechet_is_zero_on_itself_symmetric_and_counts_the_shift():
    x = RNG(3).normal(size=(64, 6))
    a, b = Moments.of(x), Moments.of(x + 2.0)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(6 * 4.0, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_too_few_samples_are_refused_with_the_number_needed():
    with pytest.raises(UserError, match="at least 12"):
        Moments.of(np.zeros((11, 6)))
    Moments.of(RNG(0).normal(size=(12, 6)))


def test_projection_keeps_the_largest_variances_and_its_hash(tmp_path):
    scale = np.array([1, 7, 0.1, 3, 0.2, 0.1])
    x = RNG(4).normal(size=(500, 6)) * scale + 5
    projection = Projection.fit(x, 2)
    np.testing.assert_allclose(np.abs(projection.components[[1, 3], [0, 1]]), 1, atol=0.02)
    variance = projection(x).var(0)
    assert variance[0] == pytest.approx(49, rel=0.2) and variance[1] == pytest.approx(9, rel=0.2)
    projection.save(tmp_path / "p.safetensors")
    assert Projection.load(tmp_path / "p.safetensors").hash == projection.hash
    assert Projection.fit(x + 1e-3, 2).hash != projection.hash


def test_projection_of_few_and_of_many_rows_is_the_same():
    """One goes by the rows' singular values, the other by the covariance."""
    x = RNG(5).normal(size=(20, 24)) * np.linspace(1, 3, 24)
    few = Projection.fit(x, 4)
    many = Projection.fit(np.concatenate([x, x]), 4)
    np.testing.assert_allclose(few.components, many.components, atol=1e-5)


def test_an_altered_projection_is_refused(tmp_path):
    Projection.fit(RNG(4).normal(size=(50, 6)), 2).save(tmp_path / "p.safetensors")
    data = bytearray((tmp_path / "p.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "p.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="altered"):
        Projection.load(tmp_path / "p.safetensors")


def test_kernel_distance_equals_the_double_sum():
    x, y = RNG(0).normal(size=(5, 4)), RNG(1).normal(size=(7, 4)) + 0.5
    within = [np.mean([cubic_kernel(z[i:i + 1], z[j:j + 1])[0, 0] for i in range(len(z))
                       for j in range(len(z)) if i != j]) for z in (x, y)]
    expected = sum(within) - 2 * cubic_kernel(x, y).mean()
    got = kernel_distance(x, y, bootstrap=50)
    assert got.value == pytest.approx(expected, rel=1e-10)
    assert (got.n, got.n_reference) == (5, 7)


def test_kernel_distance_is_unbiased_and_its_interval_covers():
    """Equal distributions: the mean over repetitions is 0 and most intervals hold 0."""
    results = [kernel_distance(RNG(2 * i).normal(size=(40, 8)), RNG(2 * i + 1).normal(size=(40, 8)),
                               bootstrap=200) for i in range(60)]
    values = np.array([r.value for r in results])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert np.mean([r.low <= 0 <= r.high for r in results]) > 0.8
    shifted = kernel_distance(RNG(0).normal(size=(40, 8)), RNG(1).normal(size=(40, 8)) + 1,
                              bootstrap=200)
    assert shifted.low > 0


def test_sharpness_of_known_pictures():
    ramp = np.zeros((2, 1, 4, 6, 3), np.uint8)
    ramp[:] = 51 * np.arange(4)[:, None, None]  # 0.2 a row downwards, nothing sideways
    assert sharpness(ramp) == pytest.approx(0.1)
    assert sharpness(np.full((1, 4, 4, 3), 200, np.uint8)) == 0.0
    checker = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert sharpness(checker) == pytest.approx(1.0)


def test_motion_features_are_differences_within_a_clip():
    features = np.array([[[1.0], [4.0], [9.0]], [[0.0], [0.0], [5.0]]])
    np.testing.assert_array_equal(motion_features(features), [[3.0], [5.0], [0.0], [5.0]])


def test_nearest_rows():
    reference = np.array([[0.0, 0], [3, 4], [10, 0]])
    index, distance = nearest(np.array([[0.0, 1], [9, 0]]), reference, k=2)
    np.testing.assert_array_equal(index, [[0, 1], [2, 1]])
    np.testing.assert_allclose(distance, [[1, np.sqrt(18)], [1, np.sqrt(52)]])
    assert nearest(np.zeros((1, 2)), reference, k=9)[0].shape == (1, 3)
