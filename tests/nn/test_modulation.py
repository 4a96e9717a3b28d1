"""The adaptive norm: by hand, and in float32 whatever the network computes in."""

import jax.numpy as jnp
import numpy as np

from apt_jax.nn.modulation import Modulation, add_gated, modulate, split_modulation

RNG = np.random.default_rng(0)


def test_by_hand():
    x, m = RNG.normal(size=(2, 3, 8)), RNG.normal(size=(2, 48))
    for branch, parts in zip(split_modulation(jnp.float32(m)), (m[:, :24], m[:, 24:])):
        shift, scale, gate = (part[:, None] for part in np.split(parts, 3, axis=1))
        normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(modulate(jnp.float32(x), branch), normed * (1 + scale) + shift,
                                   rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(add_gated(jnp.float32(x), branch, jnp.float32(x)), x * (1 + gate),
                                   rtol=2e-5, atol=2e-5)


def test_a_small_scale_counts_in_bfloat16_too():
    """1 + 0.0018 is 1 in bfloat16, which would lose it for all tokens alike."""
    x = jnp.asarray(RNG.normal(size=(1, 4, 4096)), jnp.bfloat16)
    zero = jnp.zeros((1, 1, 4096), jnp.bfloat16)
    small = Modulation(zero, zero + jnp.bfloat16(0.0018), zero)
    plain, scaled = (np.float64(modulate(x, m)) for m in (Modulation(zero, zero, zero), small))
    # Rounding to bfloat16 comes once, at the end; over many numbers the scale is there.
    assert abs((plain * scaled).sum() / (plain**2).sum() - 1.0018) < 2e-4
