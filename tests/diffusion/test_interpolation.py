"""The straight path and its inverse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.diffusion.interpolation import clean, interpolate, noise_like, velocity_target

RNG = np.random.default_rng(0)
X, Z = (RNG.normal(size=(3, 1, 2, 2, 1)).astype(np.float32) for _ in range(2))
T = jnp.asarray([0.0, 0.25, 1.0])


def test_path_by_hand():
    x_t = interpolate(X, Z, T)
    for b, t in enumerate((0.0, 0.25, 1.0)):
        np.testing.assert_allclose(x_t[b], (1 - t) * X[b] + t * Z[b], rtol=1e-6)
    np.testing.assert_array_equal(x_t[0], X[0])
    np.testing.assert_array_equal(x_t[2], Z[2])


def test_velocity_is_the_derivative_and_points_back():
    np.testing.assert_allclose(
        jax.jvp(lambda t: interpolate(X, Z, t), (T,), (jnp.ones(3),))[1],
        velocity_target(X, Z), rtol=1e-6,
    )
    np.testing.assert_array_equal(velocity_target(X, Z), Z - X)
    back = clean(interpolate(X, Z, T), velocity_target(X, Z), T)
    np.testing.assert_allclose(back, X, atol=1e-6)


def test_at_time_zero_the_velocity_does_not_matter():
    np.testing.assert_array_equal(clean(X, 1e6 * Z, jnp.zeros(3)), X)


def test_noise_is_standard_normal_and_one_key_per_sample():
    keys = jax.random.split(jax.random.key(1), 6)
    noise = noise_like(keys, (2, 16, 16, 3))
    assert noise.shape == (6, 2, 16, 16, 3) and noise.dtype == jnp.float32
    flat = np.asarray(noise).reshape(6, -1)
    assert abs(flat.mean()) < 0.03 and abs(flat.std() - 1) < 0.03
    assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 0.12
    parts = [noise_like(keys[:2], (2, 16, 16, 3)), noise_like(keys[2:], (2, 16, 16, 3))]
    np.testing.assert_array_equal(noise, jnp.concatenate(parts))
