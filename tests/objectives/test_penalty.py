"""The penalty: what it tends to, and method.md's mistake 3: its whole gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ADVERSARIAL, NETS, SHAPE, Recorder, discriminate, make_batch, make_keys, parameters

from apt_jax.objectives import adversarial

G, D = parameters("velocity", 1), parameters("discriminate", 2)
TIMES = np.array([0.2, 0.5, 0.9])


def exact(batch, t=TIMES):
    return np.asarray(
        adversarial.exact_r1(discriminate, D, batch["x"], t, batch["text"], batch["text_mask"])
    )


def test_exact_r1_is_the_squared_gradient(x64):
    batch, h = make_batch(), 1e-6
    expected = np.zeros(3)
    for index in np.ndindex(SHAPE):
        step = np.zeros((1, *SHAPE))
        step[(0, *index)] = h
        up, down = (
            discriminate(D, batch["x"] + s * step, TIMES, batch["text"], batch["text_mask"], xp=np)
            for s in (1, -1)
        )
        expected += ((up - down) / (2 * h)) ** 2
    np.testing.assert_allclose(exact(batch), expected, rtol=1e-6)


def test_approximation_tends_to_sigma_squared_times_exact_by_fourth_order(x64):
    """E (D(x) - D(x + sigma eps))^2 = sigma^2 |grad D|^2 + O(sigma^4).

    With eps and -eps both in the sum the odd orders cancel, and against the linear part of the same
    eps the error is the O(sigma^4) alone: half of sigma, a sixteenth of it.
    """
    batch = make_batch()
    gradient = jax.grad(
        lambda x: discriminate(D, x, TIMES, batch["text"], batch["text_mask"]).sum()
    )(batch["x"])
    eps = np.random.default_rng(0).normal(size=(512, 3, *SHAPE))
    eps = np.concatenate([eps, -eps])
    linear = ((eps * np.asarray(gradient)).sum((2, 3, 4, 5)) ** 2).mean(0)  # [B]
    ask = jax.jit(lambda x: discriminate(D, x, TIMES, batch["text"], batch["text_mask"]))
    clean = ask(batch["x"])

    def error(sigma):
        perturbed = jax.vmap(ask)(batch["x"] + sigma * eps)
        return np.asarray(adversarial.approximated_r1(clean, perturbed).mean(0) - sigma**2 * linear)

    order = np.log2(error(0.02) / error(0.01))
    np.testing.assert_allclose(order, 4, atol=0.1)
    np.testing.assert_allclose(linear, exact(batch), rtol=0.15)  # Monte Carlo: 512 pairs


@pytest.mark.parametrize("sigma", [0.1, 0.03, 0.01, 0.003])
def test_the_loss_in_both_modes_agrees_as_sigma_shrinks(x64, sigma):
    """Through discriminator_loss: the same sample under 20,000 draws of eps."""
    count = 20_000
    batch = jax.tree.map(lambda a: np.repeat(a[:1], count, axis=0), make_batch())
    config = ADVERSARIAL | {"r1_sigma": sigma, "fixed_time": 0.5}
    run = functools.partial(
        adversarial.discriminator_loss, D, {"generator": G}, batch, make_keys(count), NETS
    )
    approximate = float(run(config)[1]["r1"].mean()) / sigma**2
    wanted = float(run(config | {"r1_mode": "exact"})[1]["r1"][0]) / sigma**2
    assert wanted > 1e-3
    # The squares of one normal number have deviation sqrt 2, which is 1% over 20,000 draws;
    # the rest is the O(sigma^2) of this sample, whose gradient is small against its curvature.
    assert abs(approximate / wanted - 1) < 0.04 + 35 * sigma**2


def penalty_gradient(loss_gradient):
    """Of a weight-1 penalty, from the losses with weight 1 and 0."""
    return jax.tree.map(lambda a, b: np.asarray(a - b), loss_gradient(1.0), loss_gradient(0.0))


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_mistake_3_gradient_of_both_sides_into_the_whole_discriminator(x64, sigma):
    """It is 2 (D(x) - D(x')) (grad D(x) - grad D(x')), in the backbone as in the heads."""
    batch, keys, recorder = make_batch(), make_keys(), Recorder()
    config = ADVERSARIAL | {"r1_sigma": sigma}
    adversarial.discriminator_loss(D, {"generator": G}, batch, keys, recorder.nets, config)
    real, twin = sorted(
        recorder.of("discriminate"), key=lambda c: np.abs(c.x - batch["x"]).max()
    )[:2]
    assert 0 < np.abs(twin.x - real.x).max() < 10 * sigma

    def single_gradient(call):
        """grad_params D of every sample, leaves [B, ...]."""
        return jax.jacrev(
            lambda p: discriminate(p, call.x, call.t, batch["text"], batch["text_mask"])
        )(D)

    def both_sides(call):
        return discriminate(D, call.x, call.t, batch["text"], batch["text_mask"])

    difference = both_sides(real) - both_sides(twin)
    expected = jax.tree.map(
        lambda a, b: jnp.tensordot(2 * difference, a - b, axes=1),
        single_gradient(real), single_gradient(twin),
    )
    got = penalty_gradient(lambda weight: jax.grad(
        lambda p: adversarial.discriminator_loss(
            p, {"generator": G}, batch, keys, NETS, config | {"r1_weight": weight})[0].sum()
    )(D))
    for part in ("backbone", "heads", "logit"):
        for a, b in zip(jax.tree.leaves(got[part]), jax.tree.leaves(expected[part])):
            assert np.linalg.norm(b) > 0
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(np.abs(b).max()))


def test_exact_penalty_has_a_gradient_everywhere_too(x64):
    batch, keys = make_batch(), make_keys()
    got = penalty_gradient(lambda weight: jax.grad(
        lambda p: adversarial.discriminator_loss(
            p, {"generator": G}, batch, keys, NETS,
            ADVERSARIAL | {"r1_mode": "exact", "r1_sigma": 1.0, "r1_weight": weight})[0].sum()
    )(D))
    assert all(np.linalg.norm(g) > 1e-3 for g in jax.tree.leaves(got))


def test_the_penalty_weighs_lambda_and_nothing_else(x64):
    batch, keys = make_batch(), make_keys()
    values = {
        weight: adversarial.discriminator_loss(
            D, {"generator": G}, batch, keys, NETS, ADVERSARIAL | {"r1_weight": weight})
        for weight in (0.0, 1.0, 100.0)
    }
    (plain, _), (one, aux), (hundred, _) = (values[w] for w in (0.0, 1.0, 100.0))
    np.testing.assert_allclose(one - plain, aux["r1"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(hundred - plain, 100 * aux["r1"], rtol=1e-6, atol=1e-12)
