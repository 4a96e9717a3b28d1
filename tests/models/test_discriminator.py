"""The discriminator: where it looks, where its weights come from, what reaches whom."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import TINY, discriminator, mmdit, random_batch, random_params, relative_error

from apt_jax.models.discriminator import Head, default_taps, discriminator_from_diffusion
from apt_jax.models.mmdit import Backbone
from apt_jax.models.presets import discriminator_taps, make_discriminator
from apt_jax.nn.functional import Network

TAPS = (1, 3, 4)
NET = discriminator(TINY, TAPS)
PARAMS = random_params(NET, seed=1)
BATCH = random_batch(TINY)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(NET)


@pytest.mark.parametrize("depth, taps", [
    (36, (16, 26, 36)), (18, (8, 13, 18)), (24, (11, 17, 24)), (9, (4, 6, 9)), (6, (3, 4, 6)),
    (4, (2, 3, 4)), (3, (1, 2, 3)), (2, (1, 2)), (1, (1,)),
])
def test_the_papers_blocks_at_every_depth(depth, taps):
    assert default_taps(depth) == taps


def test_config_taps_and_a_shallower_discriminator():
    model = dataclasses.asdict(TINY)
    assert discriminator_taps(model, {"taps": ()}) == (2, 3, 4)
    assert discriminator_taps(model, {"taps": [1, 2]}) == (1, 2)
    shapes = make_discriminator(model, {"taps": (1, 2), "heads": 0}).abstract()
    assert shapes["backbone"]["blocks"]["video"]["out"]["kernel"].shape == (2, 16, 16)
    assert shapes["heads"]["out"]["kernel"].shape == (2, 16, 16)
    assert shapes["logit"]["kernel"].shape == (32, 1)


def test_one_float32_logit_per_sample(apply):
    logits = apply(PARAMS, *BATCH)
    assert logits.shape == (2,) and logits.dtype == jnp.float32
    bfloat16 = discriminator(dataclasses.replace(TINY, dtype="bfloat16"), TAPS)
    assert jax.eval_shape(bfloat16, PARAMS, *BATCH).dtype == jnp.float32


def test_the_logit_depends_on_every_input(apply):
    x, t, text, mask = BATCH
    plain = apply(PARAMS, *BATCH)
    for other in ((x + 0.3, t, text, mask), (x, 1 - t, text, mask), (x, t, text[::-1], mask)):
        assert np.abs(np.asarray(apply(PARAMS, *other) - plain)).min() > 1e-4
    alone = apply(PARAMS, x.at[1].add(1.0), t, text, mask)  # samples do not see each other
    np.testing.assert_allclose(alone[0], plain[0], atol=1e-5)


# -- the head, against the method's text --------------------------------------------------------

def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def head_by_hand(p, tokens, heads):
    """One learnable query token; pre-RMSNorm of the visual tokens; Q, K, V with QK RMSNorm;
    attention; output projection, residual; norm, linear, GELU, linear, residual. tokens [N, D]."""
    linear = lambda layer, x: x @ p[layer]["kernel"] + p[layer]["bias"]  # noqa: E731
    n, d = tokens.shape
    size = d // heads
    query = p["query"]
    kv = linear("kv", rms(tokens, p["norm"]["scale"]))
    q, k, v = linear("q", query), kv[:, :d], kv[:, d:]
    mixed = np.zeros(d)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        qh, kh = rms(q[part], p["q_norm"]["scale"]), rms(k[:, part], p["k_norm"]["scale"])
        score = np.array([qh @ kh[i] for i in range(n)]) / np.sqrt(size)
        weight = np.exp(score - score.max())
        mixed[part] = (weight / weight.sum()) @ v[:, part]
    token = query + linear("out", mixed)
    up = rms(token, p["mlp_norm"]["scale"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    return token + gelu(up) @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


@pytest.mark.parametrize("heads", [1, 4])
def test_the_head_by_hand(heads):
    net = Network.build(lambda rngs: Head(TINY, heads, rngs=rngs))
    params = random_params(net, seed=2)
    tokens = np.random.default_rng(3).normal(size=(2, 7, TINY.width))
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = np.stack([head_by_hand(exact, x, heads) for x in tokens])
    got = jax.jit(net)(params, jnp.asarray(tokens, jnp.float32))
    assert relative_error(got, expected) < 1e-5


def test_logit_from_the_tapped_tokens_by_hand(apply):
    """Heads see the visual tokens after blocks 1, 3, 4; joined in order, layer norm, linear."""
    backbone = Network.build(lambda rngs: Backbone(TINY, rngs=rngs))
    _, tapped, _ = jax.jit(lambda p, *b: backbone(p, *b, taps=TAPS))(PARAMS["backbone"], *BATCH)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
    heads = [jax.tree.map(lambda p: p[i], exact["heads"]) for i in range(len(TAPS))]  # noqa: B023
    expected = []
    for b in range(2):
        joined = np.concatenate(
            [head_by_hand(p, np.asarray(h[b], np.float64), 2) for p, h in zip(heads, tapped)]
        )
        normed = (joined - joined.mean()) / np.sqrt(joined.var() + 1e-6)
        normed = normed * exact["logit_norm"]["scale"] + exact["logit_norm"]["bias"]
        expected.append(normed @ exact["logit"]["kernel"][:, 0] + exact["logit"]["bias"][0])
    np.testing.assert_allclose(apply(PARAMS, *BATCH), expected, rtol=1e-4, atol=1e-5)


# -- starting weights ----------------------------------------------------------------------------

def test_built_from_diffusion_weights():
    diffusion = random_params(mmdit(TINY), seed=4)
    make = jax.jit(lambda d, key: discriminator_from_diffusion(d, NET, key))
    params = make(diffusion, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], diffusion["backbone"])
    assert jax.tree.structure(params) == jax.tree.structure(NET.abstract())
    other = make(diffusion, jax.random.key(1))
    assert not np.allclose(params["heads"]["q"]["kernel"], other["heads"]["q"]["kernel"])
    assert not np.allclose(params["heads"]["q"]["kernel"][0], params["heads"]["q"]["kernel"][1])
    assert float(np.abs(params["heads"]["query"]).min()) > 0


def test_a_shallower_discriminator_takes_the_first_blocks():
    diffusion = random_params(mmdit(TINY), seed=4)
    net = discriminator(dataclasses.replace(TINY, depth=2), (1, 2))
    params = jax.jit(lambda d: discriminator_from_diffusion(d, net, jax.random.key(0)))(diffusion)
    expected = diffusion["backbone"] | {
        "blocks": jax.tree.map(lambda p: p[:2], diffusion["backbone"]["blocks"])
    }
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], expected)


def test_other_widths_or_too_few_blocks_raise():
    diffusion = mmdit(TINY).abstract()
    for wrong in (dataclasses.replace(TINY, depth=5), dataclasses.replace(TINY, mlp_ratio=3.0)):
        net = discriminator(wrong, (1, wrong.depth))
        with pytest.raises(ValueError, match="cannot start from"):
            jax.eval_shape(
                lambda d, net=net: discriminator_from_diffusion(d, net, jax.random.key(0)),
                diffusion,
            )


# -- gradients -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def value_and_gradient():
    def value(params, x):
        return jax.nn.softplus(NET(params, x, *BATCH[1:])).sum()

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


def test_gradient_reaches_every_parameter_and_the_sample(value_and_gradient):
    _, (gradient, by_x) = value_and_gradient(PARAMS, BATCH[0])
    dead = []

    def note(path, g):
        """Per block, not only over the stack."""
        name = jax.tree_util.keystr(path)
        layers = np.asarray(g) if "'blocks'" in name or "'heads'" in name else np.asarray(g)[None]
        dead.extend((name, i) for i, layer in enumerate(layers) if not np.abs(layer).max() > 0)

    jax.tree_util.tree_map_with_path(note, gradient)
    # The heads look at visual tokens, so what the last block makes of the text leads nowhere: its
    # text queries, output projection and MLP. Everything else must learn.
    nowhere = [f"['text']['{part}']" for part in ("q_norm", "out", "mlp")]
    last = TINY.depth - 1
    assert [d for d in dead if d[1] != last or not any(part in d[0] for part in nowhere)] == []
    assert len(dead) == 7  # one scale, and kernel and bias of three linear layers
    assert np.abs(np.asarray(by_x)).min(axis=(1, 2, 3)).max() > 0
    assert np.abs(np.asarray(by_x)).max() > 1e-4


def test_gradient_equals_a_finite_difference_along_random_directions(value_and_gradient):
    """No part of it is cut: a stop_gradient anywhere would change the directional derivative."""
    x = BATCH[0]
    _, gradient = value_and_gradient(PARAMS, x)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), (PARAMS, x)  # noqa: B023
        )
        h = 2e-3
        up, down = (
            value_and_gradient(
                *jax.tree.map(lambda p, d: p + s * d, (PARAMS, x), direction)  # noqa: B023
            )[0]
            for s in (h, -h)
        )
        slope = sum(
            float((g * d).sum())
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
        )
        np.testing.assert_allclose((up - down) / (2 * h), slope, rtol=1e-2, atol=1e-2)
