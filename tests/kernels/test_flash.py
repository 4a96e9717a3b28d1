"""Our Pallas flash attention, in interpret mode, against float64 over shapes that hurt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import attention64, draw

from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.kernels.choice import choosing
from apt_jax.kernels.flash import tiles
from apt_jax.kernels.flash.attention import flash_attention


def text_front(b, keys, text=7):
    """The mask of joint attention: the text comes first, its padding is hidden, the video is not."""
    mask = np.ones((b, keys), bool)
    for i in range(b):
        mask[i, text - 2 * i - 2: text] = False
    return mask


def scattered(b, keys):
    return np.random.default_rng(5).random((b, keys)) < 0.6


def last_only(b, keys):
    mask = np.zeros((b, keys), bool)
    mask[:, -1] = True
    return mask


# batch, queries, keys, heads, head_dim, mask. Float32 tiles are 64 x 32 forward (32 x 32 of the widest
# heads), 32 x 32 backward.
CASES = {
    "one_query": (2, 1, 37, 2, 16, None),
    "one_key": (1, 5, 1, 1, 16, None),
    "whole_tiles": (1, 128, 64, 1, 32, None),
    "primes": (2, 37, 53, 2, 64, scattered),
    "one_beyond_a_tile": (1, 65, 33, 1, 64, None),
    "one_short_of_a_tile": (1, 63, 31, 1, 64, scattered),
    "joint_text_and_video": (2, 71, 71, 2, 128, text_front),
    "only_the_last_key": (1, 40, 97, 1, 16, last_only),
    "odd_head": (1, 33, 34, 2, 24, scattered),
    "tiny_head": (1, 20, 20, 1, 4, None),
    "widest_head": (1, 37, 35, 1, 256, scattered),
    "odd_wide_head": (1, 33, 34, 1, 192, None),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_float64(name):
    b, n, m, h, d, make_mask = CASES[name]
    q, k, v, dout, dlse = draw((b, n, h, d), m, jnp.float32)
    mask = None if make_mask is None else make_mask(b, m)

    def run(q, k, v):
        return flash_attention(q, k, v, None if mask is None else jnp.asarray(mask), interpret=True)

    (out, lse), pull = jax.vjp(run, q, k, v)
    grads = pull((dout, dlse))
    want_out, want_lse, want = attention64(q, k, v, mask, dout, dlse)
    np.testing.assert_allclose(out, want_out, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6, rtol=1e-5)
    for g, w in zip(grads, want):
        np.testing.assert_allclose(g, w, atol=5e-6, rtol=2e-5)


# Half a unit of the last place is 2e-3 in bfloat16 and 2.4e-4 in float16.
@pytest.mark.parametrize("dtype, d, n, m, most", [
    (jnp.bfloat16, 64, 131, 67, 6e-3), (jnp.bfloat16, 128, 129, 130, 6e-3),
    (jnp.bfloat16, 64, 1, 67, 6e-3), (jnp.bfloat16, 128, 1, 130, 6e-3),  # D's one query
    (jnp.bfloat16, 256, 65, 67, 6e-3),
    (jnp.float16, 64, 131, 67, 8e-4)])
def test_half_precision(dtype, d, n, m, most):
    q, k, v, dout, _ = draw((1, n, 1, d), m, dtype)
    mask = text_front(1, m)

    def run(q, k, v):
        return flash_attention(q, k, v, jnp.asarray(mask), interpret=True)[0]

    out, pull = jax.vjp(run, q, k, v)
    grads = pull(dout)
    want_out, _, want = attention64(q, k, v, mask, dout)
    for x, w in zip((out, *grads), (want_out, *want)):
        assert x.dtype == dtype
        error = np.linalg.norm(np.asarray(x, np.float64) - w) / np.linalg.norm(w)
        assert error < most


def test_bfloat16_accumulates_in_float32():
    """In bfloat16 a sum of ones stops at 256; here 1,000 keys of equal weight, and 1,000 queries."""
    q = jnp.zeros((1, 1000, 1, 16), jnp.bfloat16)
    v = jnp.ones((1, 1000, 1, 16), jnp.bfloat16)
    run = lambda v: flash_attention(q, q, v, interpret=True)  # noqa: E731
    (out, lse), pull = jax.vjp(run, v)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=4e-3)
    np.testing.assert_allclose(lse, np.log(1000), rtol=1e-6)
    (dv,) = pull((v, jnp.zeros_like(lse)))
    np.testing.assert_allclose(np.asarray(dv, np.float32), 1, rtol=4e-3)


def test_large_scores_do_not_overflow():
    q, k, v, dout, dlse = draw((1, 20, 1, 16), 40, jnp.float32)
    q, k = 30 * q, 30 * k  # scores of some thousands
    run = lambda *a: flash_attention(*a, interpret=True)  # noqa: E731
    (out, lse), pull = jax.vjp(run, q, k, v)
    want_out, want_lse, want = attention64(q, k, v, None, dout, 0 * dlse)
    np.testing.assert_allclose(out, want_out, atol=2e-3)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    for g, w in zip(pull((dout, 0 * dlse)), want):
        np.testing.assert_allclose(g, w, atol=1e-2 * np.abs(w).max())


def test_a_row_without_a_key_is_zeros_and_gets_no_gradient():
    q, k, v, dout, dlse = draw((2, 35, 1, 16), 40, jnp.float32)
    mask = np.ones((2, 40), bool)
    mask[1] = False
    run = lambda *a: flash_attention(*a, jnp.asarray(mask), interpret=True)  # noqa: E731
    (out, lse), pull = jax.vjp(run, q, k, v)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(lse[1], np.float32(tiles.EMPTY))
    for g, w in zip(pull((dout, dlse)), attention64(q, k, v, mask, dout, dlse)[2]):
        np.testing.assert_array_equal(g[1], 0)
        np.testing.assert_allclose(g[0], w[0], atol=5e-6, rtol=2e-5)


def test_hidden_keys_have_no_influence():
    q, k, v, dout, _ = draw((1, 20, 1, 16), 50, jnp.float32)
    mask = scattered(1, 50)
    hidden = ~mask[:, :, None, None]
    run = lambda *a: flash_attention(*a, jnp.asarray(mask), interpret=True)[0]  # noqa: E731
    out, pull = jax.vjp(run, q, k, v)
    np.testing.assert_array_equal(run(q, jnp.where(hidden, 1e4, k), jnp.where(hidden, -1e4, v)), out)
    for g in pull(dout)[1:]:
        np.testing.assert_array_equal(np.where(hidden, g, 0), 0)
        assert np.abs(np.where(hidden, 1, g)).min() > 0


def test_vmap_with_a_shared_mask():
    """The discriminator puts real, perturbed and fake samples on a new leading axis."""
    q, k, v, _, _ = draw((6, 17, 2, 16), 23, jnp.float32)
    mask = jnp.asarray(scattered(2, 23))
    parts = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v)]
    loss = lambda q, k, v: (flash_attention(q, k, v, mask, interpret=True)[0] ** 2).sum()  # noqa: E731
    values, grads = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)))(*parts)
    tiled = jnp.tile(mask, (3, 1))
    whole = jax.grad(
        lambda *a: (flash_attention(*a, tiled, interpret=True)[0] ** 2).sum(), (0, 1, 2))(q, k, v)
    assert values.shape == (3,)
    for g, w in zip(grads, whole):
        np.testing.assert_allclose(g.reshape(w.shape), w, atol=1e-5)


def test_a_second_derivative_is_refused_in_words():
    q, k, v, _, _ = draw((1, 16, 1, 16), 16, jnp.float32)

    def penalty(q):
        f = lambda q: flash_attention(q, k, v, interpret=True)[0].sum()  # noqa: E731
        return (jax.grad(f)(q) ** 2).sum()

    with pytest.raises(UserError, match="differentiated once.*'oracle'"):
        jax.grad(penalty)(q)


def test_blocks_of_keys_add_up_to_the_whole():
    """What ring attention does: parts joined by their log-sum-exps, gradients from the whole rows'."""
    q, k, v, dout, _ = draw((2, 33, 2, 16), 60, jnp.float32)
    mask = scattered(2, 60)
    mask[0, :30] = False  # one sample has no key in the first block
    with choosing(backend="pallas"):
        kernels = dispatch.blocks(q, k, v)
    parts = [(k[:, s], v[:, s], jnp.asarray(mask[:, s])) for s in (slice(0, 30), slice(30, 60))]
    outs, lses = zip(*(kernels.forward(q, *part) for part in parts))
    lse = jnp.logaddexp(*lses)
    out = sum(o * jnp.swapaxes(jnp.exp(one - lse), 1, 2)[..., None] for o, one in zip(outs, lses))
    want_out, want_lse, want = attention64(q, k, v, mask, dout)
    np.testing.assert_allclose(out, want_out, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6, rtol=1e-5)
    grads = [kernels.backward(q, *part, out, lse, dout) for part in parts]
    np.testing.assert_allclose(grads[0][0] + grads[1][0], want[0], atol=5e-6, rtol=2e-5)
    for i in (1, 2):
        joined = np.concatenate([g[i] for g in grads], axis=1)
        np.testing.assert_allclose(joined, want[i], atol=5e-6, rtol=2e-5)


def test_a_remat_policy_can_keep_the_result():
    """With the two names saved, the backward pass runs no second forward kernel."""
    q, k, v, _, _ = draw((1, 16, 1, 16), 16, jnp.float32)

    def kernels_run(policy):
        f = jax.checkpoint(lambda q: flash_attention(q, k, v, interpret=True)[0].sum(),
                           policy=policy)
        return str(jax.make_jaxpr(jax.grad(f))(q)).count("name=apt_flash_forward")

    policies = jax.checkpoint_policies
    assert kernels_run(policies.nothing_saveable) == 2
    assert kernels_run(policies.save_only_these_names("attention_out", "attention_lse")) == 1
