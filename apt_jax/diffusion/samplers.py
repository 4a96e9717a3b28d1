"""From noise to a sample: one step, two steps, or many Euler steps with guidance.

Every sampler takes `velocity(x, t, text, text_mask)` with the parameters already bound, the noise
z [B, F, H, W, C], text states [B, L, D] and their mask [B, L], and returns float32 samples like z.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from apt_jax.diffusion.guidance import Velocity, guided_velocity
from apt_jax.diffusion.interpolation import clean, interpolate
from apt_jax.diffusion.time_shift import time_grid


def _full(z: jax.Array, t: float | jax.Array) -> jax.Array:
    return jnp.full((z.shape[0],), t, jnp.float32)


def one_step(velocity: Velocity, z: jax.Array, text: jax.Array, text_mask: jax.Array) -> jax.Array:
    """G(z, c) = z - v(z, c, T), T = 1 (Eq. 3-5)."""
    return z - velocity(z, _full(z, 1.0), text, text_mask)


def two_step(
    velocity: Velocity,
    z: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    t: float = 0.5,
    fresh: jax.Array | None = None,
) -> jax.Array:
    """One step, back to time t in (0, 1) on the path to the same z, and one step from there.

    With the same noise this is two Euler steps; `fresh` [like z] uses that noise instead, which the
    caller draws (`eval.generate`: unit normal, stream 1 of the seed whose stream 0 gives z). The
    paper reports two steps (Table 4) without saying how: this is our choice.
    """
    x = one_step(velocity, z, text, text_mask)
    times = _full(z, t)
    x_t = interpolate(x, z if fresh is None else fresh, times)
    return clean(x_t, velocity(x_t, times, text, text_mask), times)


def euler(
    velocity: Velocity,
    z: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    null_text: jax.Array,
    null_mask: jax.Array,
    *,
    steps: int = 25,
    guidance: float | jax.Array = 7.5,
    shift: float = 1.0,
) -> jax.Array:
    """`steps` Euler steps of dx/dt = guided v from t = 1 to 0 on the shifted grid (2 x steps evaluations)."""
    times = time_grid(steps, shift)[::-1]

    def step(x: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        now, then = pair
        v = guided_velocity(
            velocity, x, _full(x, now), text, text_mask, null_text, null_mask, guidance
        )
        return x + (then - now) * v, None

    x, _ = jax.lax.scan(step, z, jnp.stack([times[:-1], times[1:]], axis=1))
    return x
