"""The average of the generator."""

import jax.numpy as jnp
import numpy as np

from apt_jax.train.ema import update_ema


def test_ema_is_the_weighted_sum():
    ema, decay = {"w": jnp.zeros(2)}, 0.9
    for step in range(1, 4):
        ema = update_ema(ema, {"w": jnp.full(2, float(step))}, decay, jnp.int32(step))
    np.testing.assert_allclose(ema["w"], 0.1 * (0.81 * 1 + 0.9 * 2 + 3), rtol=1e-6)


def test_ema_copies_up_to_from_step():
    ema = {"w": jnp.full(2, 7.0)}
    for step in (1, 2):
        ema = update_ema(ema, {"w": jnp.full(2, 0.1 * step)}, 0.9, jnp.int32(step), from_step=2)
        assert (ema["w"] == jnp.float32(0.1 * step)).all()
    ema = update_ema(ema, {"w": jnp.ones(2)}, 0.9, jnp.int32(3), from_step=2)
    np.testing.assert_allclose(ema["w"], 0.9 * 0.2 + 0.1, rtol=1e-6)
