"""Adversarial gradients through the real MMDiT and discriminator: method.md's mistakes 1 and 3."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from networks import TINY as SIZES  # noqa: E402
from networks import discriminator, mmdit, random_params, relative_error  # noqa: E402
from toys import ADVERSARIAL, make_keys  # noqa: E402

from apt_jax.diffusion.interpolation import noise_like  # noqa: E402
from apt_jax.diffusion.samplers import one_step  # noqa: E402
from apt_jax.objectives import Nets, adversarial  # noqa: E402

G_NET, D_NET = mmdit(SIZES), discriminator(dataclasses.replace(SIZES, depth=2), (2,))
NETS = Nets(G_NET, D_NET)
RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.uniform(-1, 1, (2, 2, 4, 6, 2)).astype(np.float32),
    "text": RNG.normal(size=(2, 3, SIZES.text_width)).astype(np.float32),
    "text_mask": np.array([[True, True, False], [True, True, True]]),
}
KEYS = make_keys(2)
CONFIG = ADVERSARIAL | {"r1_sigma": 0.1, "fixed_time": 0.4}


@pytest.fixture(scope="module")
def params():
    return random_params(G_NET, 1), random_params(D_NET, 2)


def test_mistake_1_generator_learns_through_the_whole_discriminator(params):
    """grad_G = J_G^T (-sigmoid(-D) grad_x D), so D's backbone passes the gradient on; and every
    parameter of G that its output depends on gets some."""
    g, d = params
    text, mask, t = BATCH["text"], BATCH["text_mask"], jnp.full((2,), 0.4)
    gradient = jax.jit(jax.grad(
        lambda p: adversarial.generator_loss(
            p, {"discriminator": d}, BATCH, KEYS, NETS, CONFIG)[0].sum()
    ))(g)

    # The noise z belongs to the first of the three keys that each sample's key is split into.
    fake_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(KEYS)[0]
    z = noise_like(fake_keys, BATCH["x"].shape[1:])

    @jax.jit
    def chain(g):
        fake, pull = jax.vjp(lambda p: one_step(functools.partial(G_NET, p), z, text, mask), g)
        logits, by_x = jax.vjp(lambda x: D_NET(d, x, t, text, mask), fake)
        return pull(by_x(-jax.nn.sigmoid(-logits))[0])[0]

    assert relative_error(gradient, chain(g)) < 1e-4
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.abs(leaf).max() > 0
    ]
    assert dead == []


@pytest.fixture(scope="module")
def discriminator_gradient(params):
    """(gradient with respect to D and to the frozen G) by the penalty's weight; compiled once."""
    g, d = params

    @jax.jit
    def run(weight):
        return jax.grad(
            lambda d, g: adversarial.discriminator_loss(
                d, {"generator": g}, BATCH, KEYS, NETS, CONFIG | {"r1_weight": weight})[0].sum(),
            argnums=(0, 1),
        )(d, g)

    return run


def test_discriminator_step_leaves_the_generator_alone(discriminator_gradient):
    _, by_generator = discriminator_gradient(100.0)
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(by_generator))


def test_mistake_3_penalty_regularises_backbone_and_heads(discriminator_gradient):
    """The penalty's own gradient is in every part of the real D, as in its difference of logits."""
    with_penalty, _ = discriminator_gradient(100.0)
    without, _ = discriminator_gradient(0.0)
    penalty = jax.tree.map(lambda a, b: np.asarray(a - b), with_penalty, without)
    norm = lambda tree: np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(tree)))  # noqa: E731
    blocks = penalty["backbone"]["blocks"]["video"]
    for part in (penalty["heads"], penalty["logit"], penalty["backbone"]["video_in"],
                 penalty["backbone"]["time"], blocks["qkv"], blocks["mlp"]):
        assert norm(part) > 1e-3
    per_block = (blocks["qkv"]["kernel"] ** 2).sum((1, 2))
    assert (per_block > 1e-8).all()
