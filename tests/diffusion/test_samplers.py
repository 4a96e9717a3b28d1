"""Samplers on fields whose answer is known, guidance, and the number of evaluations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.diffusion.guidance import guided_velocity
from apt_jax.diffusion.samplers import euler, one_step, two_step
from apt_jax.diffusion.time_shift import time_grid

RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(size=(2, 1, 2, 2, 3)), jnp.float32)
TEXT = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
MASK = jnp.asarray([[True, True, False], [True, True, True]])
NULL = (jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32), jnp.asarray([True, False, False]))


def level(text, mask):
    """One number per caption, [B, 1, 1, 1, 1]."""
    return (text.sum(-1) * mask).sum(-1)[:, None, None, None, None]


def field(x, t, text, mask):
    """Nonlinear in everything."""
    return jnp.tanh(x) * (1 + t[:, None, None, None, None] ** 2) + 0.3 * level(text, mask)


def broadcast(t):
    return jnp.full((2,), t)


def test_one_step():
    """G(z, c) = z - v(z, c, 1)."""
    expected = Z - field(Z, jnp.ones(2), TEXT, MASK)
    np.testing.assert_allclose(one_step(field, Z, TEXT, MASK), expected, rtol=1e-6)


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_two_steps_with_the_same_noise_are_two_euler_steps(t):
    x = Z + (t - 1) * field(Z, broadcast(1.0), TEXT, MASK)
    x = x + (0 - t) * field(x, broadcast(t), TEXT, MASK)
    np.testing.assert_allclose(two_step(field, Z, TEXT, MASK, t), x, rtol=1e-5, atol=1e-6)
    # and with the shift whose grid's middle is t, the sampler itself
    ours = euler(field, Z, TEXT, MASK, *NULL, steps=2, guidance=1.0, shift=t / (1 - t))
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-6)


def test_two_steps_with_fresh_noise():
    fresh = Z[::-1] * 0.5
    x1 = Z - field(Z, broadcast(1.0), TEXT, MASK)
    x_t = 0.6 * x1 + 0.4 * fresh
    expected = x_t - 0.4 * field(x_t, broadcast(0.4), TEXT, MASK)
    np.testing.assert_allclose(
        two_step(field, Z, TEXT, MASK, 0.4, fresh=fresh), expected, rtol=1e-5, atol=1e-6
    )


def test_guidance_formula_and_its_special_weights():
    t = jnp.asarray([0.2, 0.9])
    with_text = field(Z, t, TEXT, MASK)
    null_text, null_mask = jnp.stack([NULL[0]] * 2), jnp.stack([NULL[1]] * 2)
    without = field(Z, t, null_text, null_mask)
    assert np.abs(np.asarray(with_text - without)).min() > 1e-3
    for weight in (0.0, 1.0, 7.5):
        np.testing.assert_allclose(
            guided_velocity(field, Z, t, TEXT, MASK, *NULL, weight),
            without + weight * (with_text - without), rtol=1e-5, atol=1e-5,
        )


@pytest.mark.parametrize("shift", [1.0, 12.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_straight_path_is_exact_with_any_number_of_steps(steps, shift):
    x = jnp.asarray(RNG.normal(size=Z.shape), jnp.float32)
    found = euler(
        lambda *_: Z - x, Z, TEXT, MASK, *NULL, steps=steps, guidance=7.5, shift=shift
    )
    np.testing.assert_allclose(found, x, atol=2e-6)


def test_linear_field_and_first_order():
    """dx/dt = a x from t = 1 to 0: the product of the steps' factors, and e^-a z in the limit."""
    a, errors = 0.7, []
    run = jax.jit(
        lambda steps: euler(lambda x, *_: a * x, Z, TEXT, MASK, *NULL, steps=steps, shift=3.0),
        static_argnums=0,
    )
    for steps in (25, 50, 100):
        times = np.asarray(time_grid(steps, 3.0), np.float64)
        factor = np.prod(1 - a * np.diff(times))
        found = np.asarray(run(steps), np.float64)
        np.testing.assert_allclose(found, factor * Z, rtol=2e-5)
        errors.append(abs(factor - np.exp(-a)))
        assert np.abs(found / np.asarray(Z) - np.exp(-a)).max() < 1.1 * errors[-1] + 2e-5
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


def test_first_euler_step_is_the_noisiest():
    """Times are visited from 1 downwards; the field is never asked at 0."""
    seen = record(lambda v: euler(v, Z, TEXT, MASK, *NULL, steps=4, guidance=2.0, shift=12.0))
    expected = np.repeat(np.asarray(time_grid(4, 12.0))[:0:-1], 2)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def record(sample):
    """The times at which a sampler evaluates the network, one entry per evaluation."""
    seen = []

    @jax.custom_batching.custom_vmap
    def note(t, text):
        return text

    @note.def_vmap
    def note_slices(size, batched, t, text):  # the two sides of guidance: a vmap over the text
        seen.extend([float(t[0])] * size)
        return text, True

    def velocity(x, t, text, mask):
        if isinstance(text, jax.core.Tracer):
            note(t, text)
        else:
            seen.append(float(t[0]))
        return field(x, t, text, mask)

    with jax.disable_jit():  # lax.scan as a Python loop
        sample(velocity)
    return seen


@pytest.mark.parametrize("sample, evaluations", [
    (lambda v: one_step(v, Z, TEXT, MASK), 1),
    (lambda v: two_step(v, Z, TEXT, MASK), 2),
    (lambda v: euler(v, Z, TEXT, MASK, *NULL), 50),
], ids=["one", "two", "euler_25"])
def test_number_of_evaluations(sample, evaluations):
    assert len(record(sample)) == evaluations
