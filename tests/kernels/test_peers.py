"""The wrapped kernels of others: what of padding, order and lengths can be run without their hardware.

cuDNN and tokamax are stood in for by jax.nn's plain path, which takes the same arguments; their own
programs are compiled for H100 in tests/bench/. Splash attention runs in interpret mode.
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import attention64, draw

from apt_jax.kernels import fit, peers

PLAIN = jax.nn.dot_product_attention


@pytest.fixture
def stand_in(monkeypatch):
    """Routes both wrappers to the plain path; returns the calls' (q, k) lengths and names."""
    calls = []

    def plain(q, k, v, *, implementation, **lengths):
        calls.append((q.shape[1], k.shape[1], implementation, sorted(lengths)))
        return PLAIN(q, k, v, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=plain))
    return calls


def check(run, shape, keys, mask):
    q, k, v, dout, _ = draw(shape, keys, jnp.float32)
    out, pull = jax.vjp(lambda *a: run(*a, None if mask is None else jnp.asarray(mask)), q, k, v)
    want_out, _, want = attention64(q, k, v, mask, dout)
    assert out.shape == q.shape
    np.testing.assert_allclose(out, want_out, atol=3e-6, rtol=1e-5)
    for g, w in zip(pull(dout), want):
        np.testing.assert_allclose(g, w, atol=5e-6, rtol=2e-5)


def some_mask(b, n, *, empty=False):
    mask = np.random.default_rng(3).random((b, n)) < 0.5
    mask[0, :3] = [False, True, False]
    if empty:
        mask[-1] = False
    return mask


@pytest.mark.parametrize("name, tile", [("cudnn", 2), ("tokamax", 128)])
@pytest.mark.parametrize("masked", [False, True])
def test_odd_lengths_and_masks_fit(stand_in, name, tile, masked):
    mask = some_mask(2, 37, empty=True) if masked else None
    check(getattr(peers, name), (2, 21, 2, 16), 37, mask)
    for queries, keys, implementation, _ in stand_in:
        assert queries % tile == keys % tile == 0
        assert implementation == {"cudnn": "cudnn", "tokamax": "mosaic"}[name]


@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
def test_lengths_that_fit_pass_unchanged(stand_in, name):
    check(getattr(peers, name), (1, 128, 1, 8), 128, None)
    for queries, keys, _, lengths in stand_in:
        assert (queries, keys) == (128, 128)
        assert "key_value_seq_lengths" not in lengths or name == "tokamax"


def test_every_operand_of_cudnn_is_batched_under_vmap(monkeypatch):
    """Its vmap rule wants all of them batched; real and fake samples share a mask, and the text
    from which Wan's cross attention has its keys."""
    seen = []

    def plain(q, k, v, *, implementation, query_seq_lengths=None, key_value_seq_lengths=None):
        seen.extend(x for x in (q, k, v, query_seq_lengths, key_value_seq_lengths)
                    if type(x).__name__ == "BatchTracer")
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    mask = jnp.asarray(some_mask(2, 6))
    x = jnp.ones((3, 2, 6, 1, 8))
    jax.vmap(lambda q, k, v: peers.cudnn(q, k, v, mask))(x, x, x)
    assert len(seen) == 5
    seen.clear()
    jax.vmap(lambda q: peers.cudnn(q, x[0], x[1], None))(x)
    assert len(seen) == 3
    seen.clear()
    first = jnp.arange(6) < jnp.array([[2], [5]])
    jax.vmap(lambda q, k, v: peers.cudnn(q, k, v, first, hidden_last=True))(x, x, x)
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
def test_keys_that_are_said_to_be_in_front_are_not_moved(stand_in, name):
    run = functools.partial(getattr(peers, name), hidden_last=True)
    mask = np.arange(128) < np.array([[1], [77], [128]])
    check(run, (3, 128, 2, 16), 128, mask)
    x = jnp.ones((3, 128, 2, 16))
    program = str(jax.make_jaxpr(run)(x, x, x, jnp.asarray(mask)))
    assert "gather" not in program and "pad" not in program and "scatter" not in program
    plain = str(jax.make_jaxpr(getattr(peers, name))(x, x, x, jnp.asarray(mask)))
    assert "gather" in plain  # which is how it would look


def test_visible_keys_come_first_in_their_order():
    k = jnp.arange(5.0)[None, :, None, None]
    mask = jnp.array([[False, True, False, True, True]])
    order = fit.visible_first(mask)
    assert fit.reorder(k, order)[0, :, 0, 0].tolist() == [1, 3, 4, 0, 2]
    assert order.count.tolist() == [3]
    assert fit.reorder(mask, order).tolist() == [[True, True, True, False, False]]
    weight = jnp.arange(1.0, 6)[None, :, None, None]
    g = jax.grad(lambda k: (weight * fit.reorder(k, order)).sum())(k)
    assert g[0, :, 0, 0].tolist() == [4, 1, 5, 2, 3]  # each key's place


@pytest.mark.parametrize("dim, queries, keys, masked", [
    (64, 33, 45, True), (128, 128, 128, False), (128, 20, 130, True)])
def test_splash_attention_in_interpret_mode(dim, queries, keys, masked):
    mask = some_mask(2, keys, empty=True) if masked else None
    check(lambda *a: peers.splash(*a, interpret=True), (2, queries, 2, dim), keys, mask)
