"""Adversarial losses: values by hand, gradients in float64, method.md's mistakes 2 and 4."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import (
    ADVERSARIAL,
    NETS,
    SHAPE,
    Recorder,
    check_gradient,
    discriminate,
    make_batch,
    make_keys,
    parameters,
    part_of,
    softplus,
    sum_of,
    velocity,
)

from apt_jax.objectives import Nets, adversarial

G, D = parameters("velocity", 1), parameters("discriminate", 2)
VARIANTS = {
    "plain": {"r1": False},
    "r1": {},
    "r1_video": {"r1_sigma": 0.1, "time_shift": 12.0},
    "r1_exact": {"r1_mode": "exact", "r1_sigma": 0.1},
    "relativistic_r1_r2": {
        "loss": "relativistic", "r2": True, "r1_weight": 1000.0, "r1_sigma": 0.1,
    },
    "r2_only": {"r1": False, "r2": True},
    "fixed_time": {"fixed_time": 0.0},
}


def config_of(variant):
    return ADVERSARIAL | VARIANTS[variant]


AUGMENTED = ADVERSARIAL | {"translate": 0.5, "cutout": 0.5, "color": 1.0, "r1_sigma": 0.1}


def d_calls(recorder, batch):
    """D's calls by what they were given: real, perturbed, fake, perturbed_fake."""
    [g_call] = recorder.of("velocity")
    z = g_call.x
    np.testing.assert_array_equal(g_call.t, 1)  # G always at T
    fake = z - velocity(G, z, g_call.t.astype(np.float64), batch["text"], batch["text_mask"], xp=np)
    found = {"z": z, "fake_sample": fake}
    for call in recorder.of("discriminate"):
        np.testing.assert_array_equal(call.text, batch["text"])
        np.testing.assert_array_equal(call.mask, batch["text_mask"])
        if np.array_equal(call.x, batch["x"]):
            found.setdefault("real", call)
        elif np.allclose(call.x, fake, rtol=1e-12):
            found.setdefault("fake", call)
        else:
            near = np.abs(call.x - batch["x"]).mean() < np.abs(call.x - fake).mean()
            name = "perturbed" if near else "perturbed_fake"
            assert name not in found
            found[name] = call
    return found


def logit(call, batch):
    return discriminate(
        D, call.x, call.t.astype(np.float64), batch["text"], batch["text_mask"], xp=np
    )


def input_gradient(x, t, batch, h=1e-6):
    """grad_x D in numpy by central differences, [B, pixels]."""
    flat, columns = x.reshape(len(x), -1), []

    def ask(flat):
        sample = flat.reshape(x.shape)
        return discriminate(D, sample, t, batch["text"], batch["text_mask"], xp=np)

    for i in range(flat.shape[1]):
        step = np.zeros_like(flat)
        step[:, i] = h
        columns.append((ask(flat + step) - ask(flat - step)) / (2 * h))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_discriminator_loss_by_hand(x64, variant):
    config, batch, recorder = config_of(variant), make_batch(), Recorder()
    loss, aux = adversarial.discriminator_loss(
        D, {"generator": G}, batch, make_keys(), recorder.nets, config
    )
    calls = d_calls(recorder, batch)
    real, fake = logit(calls["real"], batch), logit(calls["fake"], batch)
    if config["loss"] == "relativistic":
        expected = softplus(fake - real)
    else:
        expected = softplus(-real) + softplus(fake)
    np.testing.assert_allclose(aux["d_gan"], expected, rtol=1e-9)
    np.testing.assert_allclose(aux["logit_real"], real, rtol=1e-9)
    np.testing.assert_allclose(aux["logit_fake"], fake, rtol=1e-9)
    if config["r1"] and config["r1_mode"] == "approximate":
        r1 = (real - logit(calls["perturbed"], batch)) ** 2
        assert (r1 > 0).all()
    elif config["r1"]:
        assert "perturbed" not in calls
        gradient = input_gradient(batch["x"], calls["real"].t.astype(np.float64), batch)
        r1 = config["r1_sigma"] ** 2 * (gradient**2).sum(1)
    else:
        assert "perturbed" not in calls and "r1" not in aux
    if config["r1"]:
        np.testing.assert_allclose(aux["r1"], r1, rtol=1e-6)
        expected = expected + config["r1_weight"] * r1
    if config["r2"]:
        r2 = (fake - logit(calls["perturbed_fake"], batch)) ** 2
        np.testing.assert_allclose(aux["r2"], r2, rtol=1e-6)
        expected = expected + config["r1_weight"] * r2
    np.testing.assert_allclose(loss, expected, rtol=1e-7)
    np.testing.assert_array_equal(aux["d_loss"], loss)


@pytest.mark.parametrize("variant", ["plain", "relativistic_r1_r2"])
def test_generator_loss_by_hand(x64, variant):
    config, batch, recorder = config_of(variant), make_batch(), Recorder()
    loss, aux = adversarial.generator_loss(
        G, {"discriminator": D}, batch, make_keys(), recorder.nets, config
    )
    calls = d_calls(recorder, batch)
    fake = logit(calls["fake"], batch)
    relativistic = config["loss"] == "relativistic"
    assert ("real" in calls) == relativistic
    expected = softplus(logit(calls["real"], batch) - fake) if relativistic else softplus(-fake)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_allclose(aux["g_logit"], fake, rtol=1e-9)


@pytest.mark.parametrize("config", [*map(config_of, VARIANTS), AUGMENTED],
                         ids=[*VARIANTS, "augmented"])
def test_discriminator_gradient_in_float64(x64, config):
    batch, keys = make_batch(), make_keys()
    loss = sum_of(adversarial.discriminator_loss)
    check_gradient(
        lambda p: loss(p, {"generator": G}, batch, keys, NETS, config), D, directions=2, rtol=1e-5,
    )


GENERATOR_VARIANTS = ["plain", "relativistic_r1_r2", "fixed_time"]


@pytest.mark.parametrize("config", [*map(config_of, GENERATOR_VARIANTS), AUGMENTED],
                         ids=[*GENERATOR_VARIANTS, "augmented"])
def test_generator_gradient_in_float64(x64, config):
    """With augmentation too: what D says of T(G(z)) reaches G through T."""
    batch, keys = make_batch(), make_keys()
    loss = sum_of(adversarial.generator_loss)
    check_gradient(
        lambda p: loss(p, {"discriminator": D}, batch, keys, NETS, config), G, directions=2,
    )


# -- mistake 2: what D is given ------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["r1", "r1_video", "relativistic_r1_r2"])
def test_mistake_2_clean_samples_and_the_same_time(variant):
    """Real: the batch itself. Perturbed: x + sigma eps, at the same t. Fake: its own t."""
    size, config = 512, config_of(variant)
    single = functools.partial(jax.tree.map, np.float32)
    batch, recorder = make_batch(size, dtype=np.float32), Recorder()
    adversarial.discriminator_loss(
        single(D), {"generator": single(G)}, batch, make_keys(size), recorder.nets, config
    )
    [g_call] = recorder.of("velocity")
    v = velocity(single(G), g_call.x, g_call.t, batch["text"], batch["text_mask"], xp=np)
    fake = g_call.x - v
    calls = recorder.of("discriminate")
    assert len(calls) == 3 + config["r2"]

    def the_one(match):
        [call] = [c for c in calls if match(c.x)]
        return call

    spread = config["r1_sigma"] * np.sqrt(np.prod(SHAPE))
    distance = lambda a, b: np.linalg.norm((a - b).reshape(size, -1), axis=1)  # noqa: E731
    is_twin = lambda x, of: 0.5 * spread < np.median(distance(x, of)) < 2 * spread  # noqa: E731
    real = the_one(lambda x: np.array_equal(x, batch["x"]))
    unreal = the_one(lambda x: np.allclose(x, fake, atol=1e-5))
    twin = the_one(lambda x: is_twin(x, batch["x"]))
    pairs = [(real, twin, batch["x"])]
    if config["r2"]:
        pairs.append((unreal, the_one(lambda x: is_twin(x, fake)), unreal.x))
    for clean, perturbed, x in pairs:
        np.testing.assert_array_equal(perturbed.t, clean.t)
        eps = (perturbed.x - x) / config["r1_sigma"]
        assert abs(eps.mean()) < 0.06 and abs(eps.std() - 1) < 0.06
        assert abs((eps * x).mean()) < 0.06  # independent of the sample, every sample its own
        assert np.abs(np.corrcoef(eps.reshape(size, -1)[:6]) - np.eye(6)).max() < 0.99
    assert abs(g_call.x.mean()) < 0.06 and abs(g_call.x.std() - 1) < 0.06  # z, not the perturbation
    assert (real.t != unreal.t).mean() > 0.99  # our choice: they draw their t separately
    assert abs(np.corrcoef(real.t, unreal.t)[0, 1]) < 0.15


# -- mistake 4: t --------------------------------------------------------------------------------

COUNT = 4096
#: D's answer is its t, G's velocity 0: the losses' logits then show the times drawn
PROBE = Nets(lambda p, x, t, text, mask: 0 * x, lambda p, x, t, text, mask: t)


@functools.cache
def drawn(time_shift, fixed_time=-1.0):
    """The t given to D for the real and fake samples of its step, and the fake of G's."""
    batch = {"x": np.zeros((COUNT, 1, 1, 1, 1), np.float32), "text": np.zeros((COUNT, 1, 1)),
             "text_mask": np.ones((COUNT, 1), bool)}
    config = ADVERSARIAL | {"time_shift": time_shift, "fixed_time": fixed_time}
    _, d_aux = adversarial.discriminator_loss(
        {}, {"generator": {}}, batch, make_keys(COUNT, 3), PROBE, config
    )
    _, g_aux = adversarial.generator_loss(
        {}, {"discriminator": {}}, batch, make_keys(COUNT, 4), PROBE, config
    )
    np.testing.assert_array_equal(d_aux["r1"], 0)  # the twin's t is the real one's
    logits = d_aux["logit_real"], d_aux["logit_fake"], g_aux["g_logit"]
    return [np.asarray(a, np.float64) for a in logits]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["real", "fake", "generator_step"])
@pytest.mark.parametrize("s", [1.0, 12.0])
def test_mistake_4_time_is_shifted_exactly_once(s, which):
    """t in [0, 1], with the distribution of Eq. 7 applied once to U(0, 1)."""
    t = np.sort(drawn(s)[which])
    assert 0 <= t[0] and 0.9 < t[-1] <= 1
    undone = t / (s - (s - 1) * t)  # uniform again
    steps = np.arange(COUNT) / COUNT
    assert np.abs(undone - steps).max() < 1.95 / np.sqrt(COUNT) + 1 / COUNT
    quantiles = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(
        np.quantile(t, quantiles), s * quantiles / (1 + (s - 1) * quantiles), atol=0.03
    )


def test_the_time_zero_ablation():
    for t in drawn(12.0, fixed_time=0.0):
        np.testing.assert_array_equal(t, 0)


# -- draws and samples ---------------------------------------------------------------------------

@pytest.mark.parametrize("step", ["discriminator", "generator"])
def test_samples_are_independent_and_draws_belong_to_keys(step):
    single = functools.partial(jax.tree.map, np.float32)
    batch, keys = make_batch(4, dtype=np.float32), make_keys(4)
    config = config_of("relativistic_r1_r2")

    @jax.jit
    def run(batch, keys):
        if step == "discriminator":
            return adversarial.discriminator_loss(
                single(D), {"generator": single(G)}, batch, keys, NETS, config)[0]
        return adversarial.generator_loss(
            single(G), {"discriminator": single(D)}, batch, keys, NETS, config)[0]

    whole = run(batch, keys)
    halves = [run(part_of(batch, s), keys[s]) for s in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(whole, jnp.concatenate(halves), rtol=1e-3, atol=1e-4)
    assert len(np.unique(whole)) == 4
