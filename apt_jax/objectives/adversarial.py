"""Stages 2 and 3: adversarial post-training against real data (Sec. 3.3, 3.4).

    G(z, c) = z - v(z, c, T)                                                        (Eq. 3-5)
    D:  softplus(-D(x, c)) + softplus(D(G(z, c), c)) + lambda (D(x, c) - D(x + sigma eps, c))^2   (Eq. 9, 10)
    G:  softplus(-D(G(z, c), c))

D sees clean samples only (Eq. 6), with a time t ~ shift(U(0, 1), s) that conditions the network and
nothing else. A real sample and its perturbed twin share their t; the fake draws its own (our choice).
Switches, off in the paper's recipe: the exact R1 (Eq. 8), the relativistic pairing and R2 of the
authors' later work, and augmentation of what D sees, for small data sets (augment.py).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from apt_jax.diffusion.interpolation import noise_like
from apt_jax.diffusion.samplers import one_step
from apt_jax.diffusion.time_shift import uniform_time
from apt_jax.kernels.choice import choosing
from apt_jax.objectives.augment import shown
from apt_jax.objectives.types import Nets, split_keys


def _draw_time(keys: jax.Array, config) -> jax.Array:
    """D's t [B]; config.fixed_time >= 0 replaces the draw (the t = 0 ablation)."""
    if config["fixed_time"] >= 0:
        return jnp.full(keys.shape, config["fixed_time"], jnp.float32)
    return uniform_time(keys, config["time_shift"])


def _shown(keys: jax.Array, x: jax.Array, config, frozen) -> jax.Array:
    """What D sees of x, with keys of its own: runs that augment nothing keep their other draws."""
    return shown(jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), x, config,
                 frozen.get("step", 0))


def generate(velocity, params, batch, keys) -> jax.Array:
    """G(z, c) for the batch's captions with fresh noise, [B, F, H, W, C]."""
    z = noise_like(keys, batch["x"].shape[1:])
    return one_step(functools.partial(velocity, params), z, batch["text"], batch["text_mask"])


def approximated_r1(logits: jax.Array, perturbed: jax.Array) -> jax.Array:
    """(D(x) - D(x + sigma eps))^2 [B] (Eq. 9). The gradient flows through both terms."""
    return (logits - perturbed) ** 2


def exact_r1(discriminate, params, x, t, text, text_mask) -> jax.Array:
    """|| grad_x D(x, c) ||^2 [B] (Eq. 8): sigma^2 times it is what the approximation tends to."""
    with choosing(derivatives=2):  # no fast attention kernel can be differentiated twice
        gradient = jax.grad(lambda x: discriminate(params, x, t, text, text_mask).sum())(x)
    return (gradient**2).sum(axis=tuple(range(1, x.ndim)))


def discriminator_loss(params, frozen, batch, keys, nets: Nets, config):
    """D's loss [B] (Eq. 10). params: discriminator; frozen: {"generator": params, and "step", the
    finished updates (0 if absent)};

    config: config.objective.adversarial. Real, perturbed and fake samples go through D together on a
    new leading axis, so the batch axis stays sharded as it was.
    """
    x, text, mask = batch["x"], batch["text"], batch["text_mask"]
    fake_keys, real_time, fake_time, eps_keys, eps_fake = split_keys(keys, 5)
    fake = jax.lax.stop_gradient(generate(nets.velocity, frozen["generator"], batch, fake_keys))
    t_real, t_fake = _draw_time(real_time, config), _draw_time(fake_time, config)
    sigma, approximate = config["r1_sigma"], config["r1_mode"] == "approximate"
    # T before the perturbation: the twin is x's own, moved alike, as near as sigma says.
    x, fake = _shown(real_time, x, config, frozen), _shown(fake_time, fake, config, frozen)

    samples, times = [x, fake], [t_real, t_fake]
    if config["r1"] and approximate:
        samples.append(x + sigma * noise_like(eps_keys, x.shape[1:]))
        times.append(t_real)
    if config["r2"]:
        samples.append(fake + sigma * noise_like(eps_fake, x.shape[1:]))
        times.append(t_fake)
    discriminate = functools.partial(nets.discriminate, params)
    logits = jax.vmap(discriminate, in_axes=(0, 0, None, None))(
        jnp.stack(samples), jnp.stack(times), text, mask
    )  # [2..4, B]
    real, fake_logit, extra = logits[0], logits[1], list(logits[2:])

    if config["loss"] == "relativistic":
        gan = jax.nn.softplus(fake_logit - real)
    else:
        gan = jax.nn.softplus(-real) + jax.nn.softplus(fake_logit)
    value = gan
    aux = {"d_gan": gan, "logit_real": real, "logit_fake": fake_logit}
    if config["r1"]:
        if approximate:
            r1 = approximated_r1(real, extra.pop(0))
        else:
            r1 = sigma**2 * exact_r1(nets.discriminate, params, x, t_real, text, mask)
        value = value + config["r1_weight"] * r1
        aux["r1"] = r1
    if config["r2"]:
        r2 = approximated_r1(fake_logit, extra.pop(0))
        value = value + config["r1_weight"] * r2
        aux["r2"] = r2
    return value, {"d_loss": value, **aux}


def generator_loss(params, frozen, batch, keys, nets: Nets, config):
    """G's loss [B]. params: generator; frozen: {"discriminator": params, and "step" as above}.

    The gradient flows through D's whole computation into G; D's parameters are not differentiated.
    """
    text, mask = batch["text"], batch["text_mask"]
    fake_keys, fake_time, real_time = split_keys(keys, 3)
    fake = generate(nets.velocity, params, batch, fake_keys)
    discriminate = functools.partial(nets.discriminate, frozen["discriminator"])
    seen = _shown(fake_time, fake, config, frozen)
    logit = discriminate(seen, _draw_time(fake_time, config), text, mask)
    if config["loss"] == "relativistic":
        real = discriminate(_shown(real_time, batch["x"], config, frozen),
                            _draw_time(real_time, config), text, mask)
        value = jax.nn.softplus(real - logit)
    else:
        value = jax.nn.softplus(-logit)
    return value, {"g_loss": value, "g_logit": logit}
