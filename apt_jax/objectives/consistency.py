"""Stage 1: discrete-time consistency distillation with constant guidance (Sec. 3.2).

On a grid of N steps, with f(x_t, t) = x_t - t v_student(x_t, t) and f(x, 0) = x:
    x_hat = x_{t_{n+1}} + (t_n - t_{n+1}) v_teacher,guided(x_{t_{n+1}}, t_{n+1})
    || f(x_{t_{n+1}}, t_{n+1}) - stop_grad f(x_hat, t_n) ||^2
The teacher is asked at every time of the grid, not only at T.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from apt_jax.diffusion.guidance import guided_velocity
from apt_jax.diffusion.interpolation import clean, interpolate, noise_like, per_sample
from apt_jax.diffusion.time_shift import time_grid
from apt_jax.objectives.types import Nets, mean_square, split_keys


def loss(params, frozen, batch, keys, nets: Nets, config):
    """Consistency loss [B].

    params: student; frozen: {"teacher": params, "null_text": [L, D], "null_mask": [L]};
    config: config.objective.consistency (steps N, shift, guidance).
    """
    x, text, mask = batch["x"], batch["text"], batch["text_mask"]
    noise_keys, index_keys = split_keys(keys, 2)
    z = noise_like(noise_keys, x.shape[1:])
    n = jax.vmap(lambda key: jax.random.randint(key, (), 0, config["steps"]))(index_keys)
    times = time_grid(config["steps"], config["shift"])
    t, t_less = times[n + 1], times[n]

    x_t = interpolate(x, z, t)
    teacher = functools.partial(nets.velocity, frozen["teacher"])
    v = guided_velocity(
        teacher, x_t, t, text, mask, frozen["null_text"], frozen["null_mask"], config["guidance"]
    )
    x_hat = x_t + per_sample(t_less - t, x_t) * v

    target = clean(x_hat, nets.velocity(params, x_hat, t_less, text, mask), t_less)
    # At t_n = 0 `clean` multiplies the velocity by 0, which is f(x, 0) = x.
    target = jax.lax.stop_gradient(target)
    student = clean(x_t, nets.velocity(params, x_t, t, text, mask), t)
    value = mean_square(student - target)
    return value, {"consistency_loss": value, "time": jnp.asarray(t)}
