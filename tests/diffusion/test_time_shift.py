"""Eq. 7 and the draws of t."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.diffusion.time_shift import logit_normal_time, shift_time, time_grid, uniform_time

unit = st.floats(0, 1, width=32)
shifts = st.floats(0.05, 50)


@given(shifts)
def test_shift_fixes_both_ends(s):
    assert float(shift_time(np.float64(0), s)) == 0
    assert float(shift_time(np.float64(1), s)) == pytest.approx(1, abs=1e-12)


@given(unit, shifts)
def test_shift_by_the_inverse_goes_back(t, s):
    there = shift_time(np.float64(t), s)
    assert 0 <= there <= 1 + 1e-12
    assert shift_time(there, 1 / s) == pytest.approx(t, abs=1e-9)


@given(unit, unit, shifts)
def test_shift_is_monotone(a, b, s):
    low, high = sorted((np.float64(a), np.float64(b)))
    assert shift_time(low, s) <= shift_time(high, s)


@given(unit)
def test_a_shift_of_one_is_no_shift_and_a_larger_one_is_noisier(t):
    assert shift_time(np.float64(t), 1) == np.float64(t)
    assert shift_time(np.float64(t), 12) >= t
    assert shift_time(np.float64(t), 12) == pytest.approx(12 * t / (1 + 11 * t))


@pytest.mark.parametrize("steps, s", [(1, 1.0), (2, 12.0), (25, 1.0), (32, 24.0), (50, 0.5)])
def test_time_grid(steps, s):
    grid = np.asarray(time_grid(steps, s), np.float64)
    assert grid.shape == (steps + 1,) and grid[0] == 0 and grid[-1] == 1
    assert (np.diff(grid) > 0).all()
    u = np.arange(steps + 1) / steps
    np.testing.assert_allclose(grid, s * u / (1 + (s - 1) * u), rtol=1e-6)


def kolmogorov(draws, distribution):
    """Largest distance between the draws' distribution and the given one."""
    x = np.sort(np.asarray(draws, np.float64))
    n = len(x)
    f = distribution(x)
    return max((np.arange(1, n + 1) / n - f).max(), (f - np.arange(n) / n).max())


KEYS = jax.random.split(jax.random.key(0), 4096)
LIMIT = 1.95 / np.sqrt(4096)  # passed by chance once in a thousand


@pytest.mark.parametrize("s", [1.0, 12.0])
def test_uniform_draws_are_shifted_once(s):
    t = uniform_time(KEYS, s)
    assert t.dtype == jnp.float32 and 0 <= t.min() and t.max() <= 1
    assert kolmogorov(t, lambda t: t / (s - (s - 1) * t)) < LIMIT  # the inverse of Eq. 7


def test_logit_normal_draws():
    from scipy.stats import norm

    t = logit_normal_time(KEYS, 3.0, mean=-0.4, std=0.8)
    assert t.dtype == jnp.float32 and 0 < t.min() and t.max() < 1

    def distribution(t):
        u = t / (3 - 2 * t)
        return norm.cdf((np.log(u / (1 - u)) + 0.4) / 0.8)

    assert kolmogorov(t, distribution) < LIMIT


@pytest.mark.parametrize("draw", [
    lambda keys: uniform_time(keys, 12.0), lambda keys: logit_normal_time(keys, 1.0)
], ids=["uniform", "logit_normal"])
def test_draws_do_not_depend_on_the_split_of_the_batch(draw):
    whole = draw(KEYS[:8])
    np.testing.assert_array_equal(whole, jnp.concatenate([draw(KEYS[:3]), draw(KEYS[3:8])]))
    assert len(np.unique(whole)) == 8
