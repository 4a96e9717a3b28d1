"""Helpers of the model tests: tiny networks, every parameter random, and small comparisons."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.models.discriminator import Discriminator
from apt_jax.models.mmdit import MMDiT, MMDiTConfig
from apt_jax.models.vae import VAEConfig
from apt_jax.nn.functional import Network

TINY = MMDiTConfig(
    in_channels=2, out_channels=2, width=16, depth=4, heads=2, head_dim=8, rope_axes=(2, 2, 4),
    text_width=6, mlp_ratio=2.0,
)


# One halving in space alone, one in space and time: the caches of both kinds of step.
TINY_VAE = VAEConfig(base=4, multipliers=(1, 2, 2), blocks=1, temporal=(False, True),
                     latent_channels=3, mean=(0.5, -1.0, 0.0), std=(2.0, 0.5, 1.0))


@functools.cache
def mmdit(config: MMDiTConfig) -> Network:
    return Network.build(lambda rngs: MMDiT(config, rngs=rngs))


@functools.cache
def discriminator(config: MMDiTConfig, taps: tuple[int, ...], heads: int = 2) -> Network:
    return Network.build(lambda rngs: Discriminator(config, taps, heads, rngs=rngs))


def random_params(net: Network, seed: int = 0):
    """Random everywhere: the zero-initialised layers too; norm scales near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names = [k.key for k in path]
        if names[-1] == "kernel":
            value = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2])
        else:
            value = 0.3 * rng.normal(size=leaf.shape) + (names[-1] == "scale")
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, net.abstract())


def random_batch(config: MMDiTConfig, grid=(2, 2, 3), batch=2, length=4, seed=0):
    """x, t, text, text_mask: a clip on a grid that is not square; sample 0's last token masked."""
    rng = np.random.default_rng(seed)
    shape = tuple(g * p for g, p in zip(grid, config.patch))
    mask = np.ones((batch, length), bool)
    mask[0, -1] = False
    return (
        jnp.asarray(rng.normal(size=(batch, *shape, config.in_channels)), jnp.float32),
        jnp.asarray(rng.uniform(size=(batch,)), jnp.float32),
        jnp.asarray(rng.normal(size=(batch, length, config.text_width)), jnp.float32),
        jnp.asarray(mask),
    )


def relative_error(a, b) -> float:
    """|a - b| / |b| over whole trees, in float64."""
    flat = [
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
        for tree in (a, b)
    ]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))
