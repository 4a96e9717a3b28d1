"""Casting the matrices before the forward pass gives the numbers that casting inside it gives."""

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.config import base_config
from apt_jax.models.presets import make_discriminator, make_generator


def networks(dtype):
    config = base_config()
    config.model.width, config.model.depth, config.model.heads = 32, 2, 4
    config.model.head_dim, config.model.rope_axes = 8, (4, 2, 2)
    config.model.text_width, config.model.dtype = 12, dtype
    config.discriminator.taps = (1, 2)
    return make_generator(config.model), make_discriminator(config.model, config.discriminator)


def inputs():
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(2, 1, 4, 4, 3)), jnp.float32), jnp.asarray([0.3, 1.0]),
            jnp.asarray(rng.normal(size=(2, 3, 12)), jnp.float32), jnp.ones((2, 3), bool))


def random_like(net, seed):
    leaves, tree = jax.tree.flatten(net.abstract())
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype) for leaf in leaves])


def test_the_copy_computes_the_same_bits_in_bfloat16():
    for seed, net in enumerate(networks("bfloat16")):
        params = random_like(net, seed)
        copy = net.compute_copy(params)
        call = jax.jit(net)
        assert np.array_equal(call(params, *inputs()), call(copy, *inputs()))


def test_the_copy_casts_the_matrices_of_bfloat16_layers_and_nothing_else():
    _, net = networks("bfloat16")
    copy = net.compute_copy(random_like(net, 0))
    half = {jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(copy)
            if leaf.dtype == jnp.bfloat16}
    assert "backbone/blocks/video/qkv/kernel" in half and "heads/kv/kernel" in half
    assert "logit/kernel" not in half  # the logit is float32
    assert all(name.endswith("/kernel") for name in half) and len(half) > 10


def test_in_float32_the_copy_is_the_original():
    net, _ = networks("float32")
    params = random_like(net, 0)
    copy = net.compute_copy(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(copy), strict=True))
