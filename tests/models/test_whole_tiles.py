"""Streams that are padded to a kernel's tiles and ordered for its lengths once, outside the layers: the
same numbers as plain attention, whatever the mask.

cuDNN and tokamax are stood in for by jax.nn's plain path, which takes lengths and knows no masks; their
own programs are compiled for H100 in tests/bench/. Splash attention runs in interpret mode.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import TINY, random_batch, random_params

from apt_jax.kernels import dispatch, fit, peers
from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.models.discriminator import Discriminator
from apt_jax.models.mmdit import MMDiT
from apt_jax.models.wan import Backbone as WanBackbone
from apt_jax.models.wan import Wan, WanConfig
from apt_jax.nn.functional import Network
from apt_jax.parallel.context import ContextParallel
from apt_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow
H100 = Hardware("gpu", "NVIDIA H100 80GB HBM3", 9.0)
PLAIN = jax.nn.dot_product_attention
GRID = (3, 3, 3)  # odd, and with the text no whole tile either
MMDIT = dataclasses.replace(TINY, depth=2)
WAN = WanConfig(in_channels=2, out_channels=2, width=16, depth=2, heads=2, head_dim=8, text_width=6,
                text_tokens=0, frequency_width=16, mlp_ratio=2.5)
NETWORKS = {
    "mmdit": (MMDIT, lambda rngs: MMDiT(MMDIT, rngs=rngs)),
    "mmdit D": (MMDIT, lambda rngs: Discriminator(MMDIT, (1, 2), 2, rngs=rngs)),
    "wan": (WAN, lambda rngs: Wan(WAN, rngs=rngs)),
    "wan D": (WAN, lambda rngs: Discriminator(WAN, (1, 2), 2, backbone=WanBackbone, rngs=rngs)),
}


@pytest.fixture
def kernels(monkeypatch):
    """tokamax and cuDNN as if they were here, for any dtype; (their name, queries, keys) as called.

    Moving or padding inside a layer fails the test that takes this.
    """
    calls = []

    def plain(q, k, v, *, implementation, **lengths):
        calls.append((implementation, q.shape[1], k.shape[1]))
        return PLAIN(q, k, v, implementation="xla", **lengths)

    def in_place(k, v, key_mask, hidden_last):
        assert key_mask is None or hidden_last, "tokens are moved inside a layer"
        return fit.in_front(k, v, key_mask, hidden_last)

    def unchanged(x, multiple):
        assert x.shape[1] % multiple == 0, "tokens are padded inside a layer"
        return x

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=plain))
    monkeypatch.setattr(dispatch, "_REFUSALS", dispatch._REFUSALS | dict.fromkeys(
        ("tokamax", "cudnn"), lambda request: None))
    monkeypatch.setattr(peers, "in_front", in_place)
    monkeypatch.setattr(peers, "pad_tokens", unchanged)
    monkeypatch.setattr(dispatch, "PADDING", float("inf"))  # these few tokens are far from a tile
    return calls


def batch_of(config, length=7):
    """Four samples: holes in the text, its beginning hidden, all of it, and nothing hidden."""
    x, t, text, _ = random_batch(config, grid=GRID, batch=4, length=length)
    mask = np.random.default_rng(4).random((4, length)) < 0.5
    mask[0, :3], mask[1, :4], mask[1, 4:] = [True, False, True], False, True
    mask[2], mask[3] = False, True
    return x, t, text, jnp.asarray(mask)


def results(net, params, batch, hardware):
    """Outputs, and the gradient of their weighted sum with respect to parameters, sample and text."""
    x, t, text, mask = batch

    def loss(params, x, text):
        out = net(params, x, t, text, mask)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (weights * out).sum(), out

    with choosing(hardware=hardware):
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
            params, x, text)
    return out, gradients


@functools.cache
def expected(name):
    """Parameters, and what plain attention makes of them."""
    config, make = NETWORKS[name]
    net = Network.build(make, attention="oracle")
    params = random_params(net)
    return params, results(net, params, batch_of(config), None)


def check(name, attention, hardware, scope=None):
    config, make = NETWORKS[name]
    params, want = expected(name)
    net = Network.build(make, attention=attention).on(scope)
    found = results(net, params, batch_of(config), hardware)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("attention, tile, name", [
    ("cudnn", 2, "mmdit D"), ("cudnn", 2, "wan"), ("tokamax", 128, "mmdit"), ("tokamax", 128, "wan D")])
def test_any_text_mask_gives_the_numbers_of_plain_attention(kernels, attention, tile, name):
    check(name, attention, H100)
    tokens = 27 if name.startswith("wan") else 27 + 7
    queries = tokens + -tokens % tile
    keys = {queries} | ({7 + -7 % tile} if name.startswith("wan") else set())
    assert {(q, k) for _, q, k in kernels} == {(queries, k) for k in keys}


@pytest.mark.parametrize("name", ["mmdit", "wan"])
def test_streams_far_from_a_tile_are_padded_inside(kernels, monkeypatch, name):
    """But ordered outside all the same."""
    monkeypatch.setattr(dispatch, "PADDING", 1 / 32)
    monkeypatch.setattr(peers, "pad_tokens", fit.pad_tokens)
    check(name, "tokamax", H100)
    assert {q for _, q, _ in kernels} == {128}


@pytest.mark.parametrize("name", ["mmdit", "wan D"])
def test_so_it_is_where_samples_are_cut_over_devices(kernels, name):
    """And heads; tokens are not."""
    mesh = make_mesh({"replica": 2, "fsdp": 2, "context": 1, "tensor": 2})
    check(name, "tokamax", H100, ContextParallel(mesh))
    assert {q for _, q, _ in kernels} == {128}


def test_where_tokens_are_cut_every_layer_does_it(kernels, monkeypatch):
    """Devices join pieces of the streams: what is last in one's network is not last for the kernel."""
    monkeypatch.setattr(peers, "in_front", fit.in_front)
    monkeypatch.setattr(peers, "pad_tokens", fit.pad_tokens)
    mesh = make_mesh({"replica": 1, "fsdp": 4, "context": 2, "tensor": 1})
    check("mmdit", "tokamax", H100, ContextParallel(mesh))
    assert {q for _, q, _ in kernels} == {128}


@pytest.mark.parametrize("family", ["mmdit", "wan"])
def test_splash_attention_pads_once(monkeypatch, family):
    """It takes a mask, so nothing is moved. Its heads are of 64 channels."""
    wide = dataclasses.replace(NETWORKS[family][0], width=64, heads=1, head_dim=64, depth=1)
    if family == "mmdit":
        wide = dataclasses.replace(wide, rope_axes=(16, 24, 24))
    nets = [Network.build(lambda rngs: {"mmdit": MMDiT, "wan": Wan}[family](wide, rngs=rngs),
                          attention=attention) for attention in ("splash", "oracle")]
    params, batch, seen, pad = random_params(nets[0]), batch_of(wide), [], fit.pad_tokens

    def unchanged(x, multiple):
        seen.append(x.shape[1])
        assert x.shape[1] % multiple == 0, "tokens are padded inside a layer"
        return pad(x, multiple)

    monkeypatch.setattr(peers, "pad_tokens", unchanged)
    monkeypatch.setattr(dispatch, "PADDING", float("inf"))
    found, want = (jax.jit(net)(params, *batch) for net in nets)
    np.testing.assert_allclose(found, want, rtol=0, atol=4e-6 * float(np.abs(want).max()))
    assert set(seen) == {128}
