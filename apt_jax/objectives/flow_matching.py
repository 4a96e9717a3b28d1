"""Stage 0: flow matching (Sec. 3.1). x_t = (1 - t) x + t z; || v(x_t, t, c) - (z - x) ||^2."""

from __future__ import annotations

from apt_jax.diffusion.interpolation import interpolate, noise_like, velocity_target
from apt_jax.diffusion.time_shift import logit_normal_time
from apt_jax.objectives.types import Nets, mean_square, split_keys


def loss(params, frozen, batch, keys, nets: Nets, config):
    """Flow-matching loss [B]; t is logit-normal, then shifted by config.shift.

    params: generator; frozen: unused; config: config.objective.flow (shift, logit_mean, logit_std).
    """
    del frozen
    x = batch["x"]
    noise_keys, time_keys = split_keys(keys, 2)
    z = noise_like(noise_keys, x.shape[1:])
    t = logit_normal_time(time_keys, config["shift"], config["logit_mean"], config["logit_std"])
    v = nets.velocity(params, interpolate(x, z, t), t, batch["text"], batch["text_mask"])
    value = mean_square(v - velocity_target(x, z))
    return value, {"flow_loss": value}
