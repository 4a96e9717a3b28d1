"""Properties of Wan that parity alone does not show, and the discriminator on it."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_batch, random_params, relative_error

from apt_jax.errors import UserError
from apt_jax.models.discriminator import default_taps, discriminator_from_diffusion
from apt_jax.models.mmdit import MMDiT, MMDiTConfig
from apt_jax.models.presets import make_discriminator, make_generator, model_config
from apt_jax.models.wan import Backbone, Wan, WanConfig
from apt_jax.models.wan.config import wan_rope_axes
from apt_jax.models.wan.model import zero_padded
from apt_jax.nn.functional import Network

TINY = WanConfig(
    in_channels=2, out_channels=2, width=16, depth=4, heads=2, head_dim=8, text_width=6,
    text_tokens=9, frequency_width=16, mlp_ratio=2.5,
)


def wan(config: WanConfig) -> Network:
    return Network.build(lambda rngs: Wan(config, rngs=rngs))


NET = wan(TINY)
PARAMS = random_params(NET)
BATCH = random_batch(TINY)
MODEL = dataclasses.asdict(TINY) | {"family": "wan"}


@pytest.fixture(scope="module")
def apply():
    return jax.jit(NET)


# -- sizes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, parameters", [
    (WanConfig(), 1_418_996_800),
    (WanConfig(width=5120, depth=40, heads=40, mlp_ratio=13_824 / 5120), 14_288_491_584),
], ids=["1.3B", "14B"])
def test_the_public_sizes(config, parameters):
    """diffusers' parameter counts of Wan 2.1 T2V; nothing is allocated."""
    net = wan(config)
    assert net.parameter_count() == parameters
    shape = jax.ShapeDtypeStruct
    v = jax.eval_shape(net, net.abstract(), shape((1, 21, 60, 104, 16), "float32"),
                       shape((1,), "float32"), shape((1, 77, 4096), "float32"),
                       shape((1, 77), bool))
    assert v.shape == (1, 21, 60, 104, 16) and v.dtype == jnp.float32


def test_qwen_image_is_an_mmdit():
    config = MMDiTConfig(in_channels=16, out_channels=16, width=3072, depth=60, heads=24,
                         head_dim=128, rope_axes=(16, 56, 56), text_width=3584)
    assert Network.build(lambda rngs: MMDiT(config, rngs=rngs)).parameter_count() == 20_430_401_088


def test_rotary_channels():
    assert wan_rope_axes(128) == (44, 42, 42)
    assert all(sum(wan_rope_axes(n)) == n for n in range(6, 130, 2))


def test_the_config_makes_the_network():
    fields = MODEL | {"patch": [1, 2, 2], "rope_axes": (4, 2, 2), "modulation": "per_block"}
    assert model_config(fields) == TINY  # the fields of other families are left out
    chex.assert_trees_all_equal_shapes_and_dtypes(make_generator(fields).abstract(), NET.abstract())
    with pytest.raises(UserError, match="model.family = 'unet' is not one of mmdit, wan"):
        make_generator(fields | {"family": "unet"})
    older = dataclasses.asdict(MMDiTConfig())  # weights from before the field
    assert isinstance(model_config(older), MMDiTConfig)


def test_a_new_network_says_zero(apply):
    params = jax.jit(NET.init)(jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, NET.abstract())
    np.testing.assert_array_equal(apply(params, *BATCH), 0)
    tables = params["backbone"]["blocks"]["modulation"]  # [depth, 6, D]
    assert not np.allclose(tables[0], tables[1]) and 0.15 < tables.std() < 0.35  # 1 / sqrt(16)


# -- geometry and text ---------------------------------------------------------------------------

@pytest.mark.parametrize("axis", [1, 2, 3], ids=["frames", "rows", "columns"])
def test_every_axis_has_a_position(apply, axis):
    x, t, text, mask = BATCH
    straight = apply(PARAMS, x, t, text, mask)
    turned = jnp.flip(apply(PARAMS, jnp.flip(x, axis), t, text, mask), axis)
    assert relative_error(turned, straight) > 1e-2


def test_text_is_zeroed_filled_up_and_seen():
    text = jnp.arange(1.0, 13.0).reshape(1, 3, 4)
    mask = jnp.array([[True, True, False]])
    padded = zero_padded(text, mask, 5)
    np.testing.assert_array_equal(padded[0, :2], text[0, :2])
    np.testing.assert_array_equal(padded[0, 2:], 0)
    assert padded.shape == (1, 5, 4) and zero_padded(text, mask, 0).shape == text.shape
    with pytest.raises(ValueError, match="3 states is longer than text_tokens = 2"):
        zero_padded(text, mask, 2)


def test_what_the_padding_holds_and_how_long_it_is_changes_nothing(apply):
    x, t, text, mask = BATCH
    plain = apply(PARAMS, x, t, text, mask)
    np.testing.assert_array_equal(
        apply(PARAMS, x, t, jnp.where(mask[..., None], text, 7.0), mask), plain)
    wide = jnp.pad(text, ((0, 0), (0, 3), (0, 0)), constant_values=5.0)
    wide_mask = jnp.pad(mask, ((0, 0), (0, 3)))
    np.testing.assert_allclose(apply(PARAMS, x, t, wide, wide_mask), plain, rtol=1e-6)


def test_samples_do_not_see_each_other(apply):
    x, t, text, mask = BATCH
    plain = apply(PARAMS, *BATCH)
    other = apply(PARAMS, x.at[1].add(1.0), t.at[1].set(0.9), text.at[1].multiply(2.0), mask)
    np.testing.assert_allclose(other[0], plain[0], atol=1e-6)
    assert relative_error(other[1], plain[1]) > 1e-2


@pytest.mark.parametrize("wrong, error", [
    (lambda x, t, c, m: (x[0], t, c, m), AssertionError),
    (lambda x, t, c, m: (x, t[:1], c, m), AssertionError),
    (lambda x, t, c, m: (x, t, c[..., :-1], m), AssertionError),
    (lambda x, t, c, m: (x[..., :-1], t, c, m), AssertionError),
    (lambda x, t, c, m: (x[:, :, :-1], t, c, m), ValueError),
    (lambda x, t, c, m: (x, t, jnp.zeros((2, 10, 6)), jnp.ones((2, 10), bool)), ValueError),
], ids=["rank", "batch", "text_width", "channels", "patch", "text_tokens"])
def test_wrong_shapes_raise(wrong, error):
    with pytest.raises(error):
        jax.eval_shape(NET, PARAMS, *wrong(*BATCH))


# -- taps, rematerialisation, precision ----------------------------------------------------------

def tapped(config: WanConfig, taps):
    net = Network.build(lambda rngs: Backbone(config, rngs=rngs))
    return lambda params, *batch: net(params, *batch, taps=taps)


def test_a_tap_is_what_a_shallower_network_ends_with():
    backbone = PARAMS["backbone"]
    last, taps, time = jax.jit(tapped(TINY, (1, 3)))(backbone, *BATCH)
    assert [h.shape for h in taps] == [(2, 12, 16)] * 2 and time.shape == (2, 16)
    for depth, hidden in zip((1, 3), taps):
        blocks = jax.tree.map(lambda p: p[:depth], backbone["blocks"])  # noqa: B023
        end, _, _ = jax.jit(tapped(dataclasses.replace(TINY, depth=depth), ()))(
            backbone | {"blocks": blocks}, *BATCH)
        np.testing.assert_allclose(hidden, end, rtol=1e-5, atol=1e-5)
    assert relative_error(last, taps[1]) > 1e-2


def test_rematerialisation_changes_no_value_and_no_gradient():
    def results(remat):
        run = tapped(dataclasses.replace(TINY, remat=remat), (2, 4))

        def value(backbone, x):
            last, taps, _ = run(backbone, x, *BATCH[1:])
            return sum((h**2).mean() for h in taps) + jnp.sin(last).mean()

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(PARAMS["backbone"], BATCH[0])

    plain, expected = results("none")
    value, gradient = results("full")
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    assert relative_error(gradient, expected) < 1e-5
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 0


def test_bfloat16_compute_with_float32_parameters(apply):
    net = wan(dataclasses.replace(TINY, dtype="bfloat16"))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(net.abstract()))
    v, pull = jax.vjp(jax.jit(lambda p: net(p, *BATCH)), PARAMS)
    assert v.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(pull(v)))
    assert 1e-4 < relative_error(v, apply(PARAMS, *BATCH)) < 3e-2


# -- the discriminator ---------------------------------------------------------------------------

def test_the_papers_fractions_of_wans_depths():
    assert default_taps(30) == (13, 22, 30) and default_taps(40) == (18, 29, 40)


@pytest.fixture(scope="module")
def judge():
    """D on the first three blocks, from the generator's weights."""
    net = make_discriminator(MODEL, {"taps": (1, 3), "heads": 0})
    return net, jax.jit(lambda g, key: discriminator_from_diffusion(g, net, key))(
        PARAMS, jax.random.key(0))


def test_the_discriminator_starts_from_the_first_blocks(judge):
    net, params = judge
    expected = PARAMS["backbone"] | {
        "blocks": jax.tree.map(lambda p: p[:3], PARAMS["backbone"]["blocks"])}
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, net.abstract())
    assert set(params) == {"backbone", "heads", "logit", "logit_norm"}


def test_the_logit_depends_on_every_input_and_teaches_every_parameter(judge):
    net, params = judge

    def value(params, x, t, text):
        logits = net(params, x, t, text, BATCH[3])
        return jax.nn.softplus(logits).sum(), logits

    (_, logits), gradients = jax.jit(
        jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True))(params, *BATCH[:3])
    assert logits.shape == (2,) and logits.dtype == jnp.float32
    dead = [jax.tree_util.keystr(path) for path, g in
            jax.tree_util.tree_leaves_with_path(gradients) if not float(jnp.abs(g).max()) > 0]
    assert dead == []


def test_the_full_discriminators_build_abstractly():
    """Heads after blocks 13, 22, 30 (1.3B) and 18, 29, 40 (14B): the whole backbone and more."""
    for fields, heads in (({}, 3), (dict(width=5120, depth=40, heads=40, mlp_ratio=2.7), 3)):
        model = dataclasses.asdict(WanConfig(**fields)) | {"family": "wan"}
        net = make_discriminator(model, {"taps": (), "heads": 0})
        assert net.abstract()["heads"]["query"].shape == (heads, model["width"])
        assert net.parameter_count() > make_generator(model).parameter_count()
