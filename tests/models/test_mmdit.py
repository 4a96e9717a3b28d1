"""Properties of the MMDiT that parity alone does not show."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import TINY, mmdit, random_batch, random_params, relative_error

from apt_jax.models.mmdit import Backbone, MMDiTConfig
from apt_jax.models.presets import make_generator, model_config
from apt_jax.nn.embeddings import patchify, sinusoidal, unpatchify
from apt_jax.nn.functional import Network

PARAMS = random_params(mmdit(TINY))
BATCH = random_batch(TINY)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(mmdit(TINY))


@pytest.fixture(scope="module")
def new_params():
    return jax.jit(mmdit(TINY).init)(jax.random.key(0))


def test_parameters_are_a_plain_float32_dict(new_params):
    params = new_params
    chex.assert_trees_all_equal_shapes_and_dtypes(params, mmdit(TINY).abstract())
    assert type(params) is dict and all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert params["backbone"]["blocks"]["video"]["qkv"]["kernel"].shape == (4, 16, 48)
    kernels = params["backbone"]["blocks"]["video"]["qkv"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])  # each block has its own draw
    assert mmdit(TINY).parameter_count() == sum(p.size for p in jax.tree.leaves(params))


def test_a_new_network_says_zero(apply, new_params):
    """Modulation gates and the output layer start at 0."""
    v = apply(new_params, *BATCH)
    assert v.shape == BATCH[0].shape
    np.testing.assert_array_equal(v, 0)


# -- geometry ------------------------------------------------------------------------------------

def test_rows_and_columns_are_told_apart(apply):
    """The transposed picture does not give the transposed answer: the two axes have their own RoPE
    frequencies (2 and 4 channels here) and the grid is not square."""
    x, t, text, mask = BATCH
    straight = apply(PARAMS, x, t, text, mask)
    turned = apply(PARAMS, x.transpose(0, 1, 3, 2, 4), t, text, mask).transpose(0, 1, 3, 2, 4)
    assert relative_error(turned, straight) > 1e-2


@pytest.mark.parametrize("axis", [1, 2, 3], ids=["frames", "rows", "columns"])
def test_every_axis_has_a_position(apply, axis):
    """Reversing frames, rows or columns is not merely reversed in the answer."""
    x, t, text, mask = BATCH
    straight = apply(PARAMS, x, t, text, mask)
    turned = jnp.flip(apply(PARAMS, jnp.flip(x, axis), t, text, mask), axis)
    assert relative_error(turned, straight) > 1e-2


def test_patchify_is_channel_major_and_invertible():
    x = jnp.arange(2 * 2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 2, 4, 6, 3)
    tokens = patchify(x, (1, 2, 2))
    assert tokens.shape == (2, 2 * 2 * 3, 12)
    # token of frame 1, row 1, column 2 (number 6 + 3 + 2) is the corner [2:4, 4:6], channel first
    corner = np.asarray(x)[0, 1, 2:4, 4:6]  # [2, 2, C]
    np.testing.assert_array_equal(tokens[0, 11], corner.transpose(2, 0, 1).ravel())
    np.testing.assert_array_equal(unpatchify(tokens, (2, 2, 3), (1, 2, 2)), x)
    np.testing.assert_array_equal(unpatchify(patchify(x, (2, 1, 3)), (1, 4, 2), (2, 1, 3)), x)


def test_time_embedding_by_hand():
    t = np.array([0.0, 0.3, 1.0])
    rates = 10_000.0 ** (-np.arange(128) / 128)
    angle = 1000 * t[:, None] * rates
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(t, jnp.float32)), expected, atol=3e-4)


# -- modulation ----------------------------------------------------------------------------------

def test_shared_modulation_equals_equal_per_block_layers(apply):
    """Per-block layers that all hold W, and a bias of b plus the block's own offset, are the shared
    vector W silu(time) + b plus the offsets."""
    config = dataclasses.replace(TINY, modulation="shared")
    net = mmdit(config)
    shared = random_params(net, seed=5)
    kernel, bias = (shared["backbone"]["modulation"][k] for k in ("kernel", "bias"))
    per_block = jax.tree.map(lambda p: p, shared)  # a copy of the dicts
    del per_block["backbone"]["modulation"]
    for stream in ("video", "text"):
        offsets = shared["backbone"]["blocks"][stream]["modulation"]  # [depth, 6 D]
        per_block["backbone"]["blocks"][stream]["modulation"] = {
            "kernel": jnp.broadcast_to(kernel, (config.depth, *kernel.shape)),
            "bias": bias + offsets,
        }
    expected = apply(per_block, *BATCH)
    assert relative_error(jax.jit(net)(shared, *BATCH), expected) < 1e-5
    assert net.parameter_count() < mmdit(TINY).parameter_count()


# -- text ----------------------------------------------------------------------------------------

def test_masked_text_has_no_influence(apply):
    x, t, text, mask = BATCH
    plain = apply(PARAMS, x, t, text, mask)
    other = jnp.where(mask[..., None], text, 100.0 * text + 7.0)
    np.testing.assert_array_equal(apply(PARAMS, x, t, other, mask), plain)
    seen = text.at[1, -1].add(1.0)  # the same token, not masked, in the other sample
    changed = apply(PARAMS, x, t, seen, mask)
    np.testing.assert_array_equal(changed[0], plain[0])
    assert relative_error(changed[1], plain[1]) > 1e-3


def test_padding_the_text_further_changes_nothing(apply):
    x, t, text, mask = BATCH
    wide = jnp.pad(text, ((0, 0), (0, 3), (0, 0)))
    wide_mask = jnp.pad(mask, ((0, 0), (0, 3)))
    assert relative_error(apply(PARAMS, x, t, wide, wide_mask), apply(PARAMS, *BATCH)) < 1e-5


def test_samples_do_not_see_each_other(apply):
    x, t, text, mask = BATCH
    plain = apply(PARAMS, *BATCH)
    other = apply(PARAMS, x.at[1].add(1.0), t.at[1].set(0.9), text.at[1].multiply(2.0), mask)
    np.testing.assert_allclose(other[0], plain[0], atol=1e-6)
    assert relative_error(other[1], plain[1]) > 1e-2


# -- taps and rematerialisation ------------------------------------------------------------------

def tapped(config: MMDiTConfig, taps):
    net = Network.build(lambda rngs: Backbone(config, rngs=rngs))
    return lambda params, *batch: net(params, *batch, taps=taps)


def shallower(params, depth):
    return params | {"blocks": jax.tree.map(lambda p: p[:depth], params["blocks"])}


def test_a_tap_is_what_a_shallower_network_ends_with():
    backbone = PARAMS["backbone"]
    last, taps, _ = jax.jit(tapped(TINY, (1, 3)))(backbone, *BATCH)
    assert [h.shape for h in taps] == [(2, 12, 16)] * 2
    for depth, hidden in zip((1, 3), taps):
        config = dataclasses.replace(TINY, depth=depth)
        end, none, _ = jax.jit(tapped(config, ()))(shallower(backbone, depth), *BATCH)
        assert not none
        np.testing.assert_allclose(hidden, end, rtol=1e-5, atol=1e-5)
    # and the cut into segments changes nothing at the end
    whole, _, _ = jax.jit(tapped(TINY, ()))(backbone, *BATCH)
    np.testing.assert_allclose(last, whole, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def by_policy():
    """Value and gradient of a function of the taps under every rematerialisation policy."""
    results = {}
    for remat in ("none", "full", "dots", "attention", "offload"):
        run = tapped(dataclasses.replace(TINY, remat=remat), (2, 4))

        def value(backbone, x, run=run):
            last, taps, _ = run(backbone, x, *BATCH[1:])
            return sum((h**2).mean() for h in taps) + jnp.sin(last).mean()

        results[remat] = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(
            PARAMS["backbone"], BATCH[0]
        )
    return results


@pytest.mark.parametrize("remat", ["full", "dots", "attention", "offload"])
def test_rematerialisation_changes_no_value_and_no_gradient(by_policy, remat):
    (value, gradient), (plain, expected) = by_policy[remat], by_policy["none"]
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    assert relative_error(gradient, expected) < 1e-5


def subjaxprs(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from subjaxprs(inner)


def scans(function, *args):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [e for j in subjaxprs(jaxpr) for e in j.eqns if e.primitive.name == "scan"]


def stacked_outputs(eqn):
    """Shapes of a scan's outputs that gain a leading axis over the body's, so no carries."""
    inner = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    pairs = zip(eqn.outvars, inner.outvars, strict=True)
    return [out.aval.shape for out, v in pairs if out.aval.shape != v.aval.shape]


def test_tapping_stores_no_other_activation():
    """Forward: scans emit nothing but their carry, one scan per segment."""
    found = scans(tapped(TINY, (1, 3)), PARAMS["backbone"], *BATCH)
    assert [e.params["length"] for e in found] == [1, 2, 1]
    assert all(stacked_outputs(e) == [] for e in found)


def test_full_rematerialisation_stores_only_the_carries():
    """With gradient: per block the two streams' hidden states, where "none" keeps far more."""
    def kept(remat):
        run = tapped(dataclasses.replace(TINY, remat=remat), (2, 4))

        def value(x):
            return run(PARAMS["backbone"], x, *BATCH[1:])[1][-1].sum()

        return sum(
            int(np.prod(shape))
            for e in scans(jax.grad(value), BATCH[0]) for shape in stacked_outputs(e)
        )

    b, n, length, d = 2, 12, 4, TINY.width
    assert kept("full") <= TINY.depth * b * (n + length) * d * 1.1
    assert kept("full") < kept("dots") < kept("none")
    # On top of the carries attention's result and log-sum-exp of every token.
    assert kept("attention") - kept("full") == TINY.depth * b * (n + length) * (d + TINY.heads)


def test_offloading_keeps_nothing_on_the_device():
    run = tapped(dataclasses.replace(TINY, remat="offload"), (4,))

    def value(x):
        return run(PARAMS["backbone"], x, *BATCH[1:])[1][-1].sum()

    spaces = {str(v.aval.memory_space) for e in scans(jax.grad(value), BATCH[0])
              for v in e.outvars if v.aval.ndim > 3 or v.aval.shape[:1] == (TINY.depth,)}
    assert spaces and all("host" in space.lower() for space in spaces)


# -- precision and errors ------------------------------------------------------------------------

def test_bfloat16_compute_with_float32_parameters(apply):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    net = mmdit(config)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(net.abstract()))

    def value(params):
        v = net(params, *BATCH)
        return (v**2).mean(), v

    (_, v), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(PARAMS)
    assert v.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))
    error = relative_error(v, apply(PARAMS, *BATCH))
    assert 1e-5 < error < 3e-2  # it does compute in bfloat16, and stays close


@pytest.mark.parametrize("wrong, error", [
    (lambda x, t, c, m: (x[0], t, c, m), AssertionError),
    (lambda x, t, c, m: (x, t[:, None], c, m), AssertionError),
    (lambda x, t, c, m: (x, t[0], c, m), AssertionError),
    (lambda x, t, c, m: (x, t[:1], c, m), AssertionError),
    (lambda x, t, c, m: (x, t, c[..., :-1], m), AssertionError),
    (lambda x, t, c, m: (x[..., :-1], t, c, m), AssertionError),
    (lambda x, t, c, m: (x, t, c, m.astype(jnp.float32)), AssertionError),
    (lambda x, t, c, m: (x, t, c, m[:, :-1]), AssertionError),
    (lambda x, t, c, m: (x[:, :, :-1], t, c, m), ValueError),
], ids=["rank_x", "rank_t", "scalar_t", "batch", "text_width", "channels", "mask_dtype",
        "mask_length", "patch"])
def test_wrong_shapes_raise(wrong, error):
    with pytest.raises(error):
        jax.eval_shape(mmdit(TINY), PARAMS, *wrong(*BATCH))


def test_the_config_makes_the_network():
    fields = dataclasses.asdict(TINY) | {"patch": [1, 2, 2], "rope_axes": [2, 2, 4]}
    assert model_config(fields) == TINY
    chex.assert_trees_all_equal_shapes_and_dtypes(
        make_generator(fields).abstract(), mmdit(TINY).abstract()
    )
