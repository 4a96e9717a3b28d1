"""Eight-bit attention: its rounding against numpy's, its distance from none, what it is asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from attention_float64 import attention64, draw

from apt_jax.errors import UserError
from apt_jax.kernels import cudnn_fp8 as fp8
from apt_jax.kernels.attention import attention
from apt_jax.kernels.choice import Hardware, choosing

H100 = Hardware("gpu", "NVIDIA H100 80GB HBM3", 9.0)
UNIT = 2.0**-4  # the most that rounding to e4m3 changes a number by, of itself


def e4m3(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def scale_of(x):
    return 2.0 ** np.ceil(np.log2(np.abs(x).max() / 448))


def in_eight_bits(q, k, v, mask=None):
    """float64 sums of numbers rounded as the kernel does; hidden keys taken out of them at the end."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    softmax_scale = q.shape[-1] ** -0.5
    signs = np.random.default_rng(0).choice([-1.0, 1.0], q.shape[-1])
    turn = signs[:, None] * scipy.linalg.hadamard(q.shape[-1]) / q.shape[-1]
    q, k = q @ turn * q.shape[-1], k @ turn
    mask = np.ones(k.shape[:2], bool) if mask is None else mask
    mean = np.zeros((len(k), 1, *v.shape[2:]))
    for b, seen in enumerate(mask):
        for x in (k, v):
            mean[b] = x[b, seen].mean(0) if seen.any() else 0.0
            x[b] = np.where(seen[:, None, None], x[b] - mean[b], 0)
    fill = ((0, 0), (0, -k.shape[1] % 128), (0, 0), (0, 0))
    k, v, mask = np.pad(k, fill), np.pad(v, fill), np.pad(mask, fill[:2])
    sq, sk, sv = map(scale_of, (q, k, v))
    q, k, v = e4m3(q / sq), e4m3(k / sk), e4m3(v / sv)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * sq * sk * softmax_scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total, seen = (np.swapaxes(w.sum(-1), 1, 2)[..., None]
                   for w in (weights, weights * mask[:, None, None]))
    out = np.einsum("bhqk,bkhd->bqhd", e4m3(weights * 256) / 256, v)
    out = e4m3(out / total) * sv * total / np.maximum(seen, 1e-30) + mean
    return np.where(mask.any(1)[:, None, None, None], out, 0)


def some_mask(b, n):
    mask = np.random.default_rng(3).random((b, n)) < 0.5
    mask[0, :3] = [False, True, False]
    mask[-1] = False
    return mask


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def eight(q, k, v, mask=None):
    @jax.jit
    def run(q, k, v):
        with choosing(backend="cudnn_fp8"):
            return attention(q, k, v, None if mask is None else jnp.asarray(mask))

    return run(q, k, v)


CASES = [((2, 21, 2, 16), 37, True), ((3, 17, 1, 128), 300, True), ((1, 128, 2, 64), 256, False),
         ((1, 131, 2, 32), 67, False)]


@pytest.mark.parametrize("shape, keys, masked", CASES)
def test_it_rounds_as_numpy_does_and_is_near_float64(shape, keys, masked):
    mask = some_mask(shape[0], keys) if masked else None
    q, k, v, _, _ = draw(shape, keys, jnp.float32)
    k = k + 3.0  # a mean that no softmax notices
    out = eight(q, k, v, mask)
    # A numerator that float32 and float64 put on different sides of a tie differs by a whole unit.
    assert distance(out, in_eight_bits(q, k, v, mask)) < 3e-3
    exact, _ = attention64(q, k, v, mask)
    assert 0.01 < distance(out, exact) < 0.08
    assert out.dtype == q.dtype and np.isfinite(np.asarray(out)).all()
    if masked:
        np.testing.assert_array_equal(out[-1], 0)


def test_no_element_is_further_off_than_rounding_allows():
    q, k, v, _, _ = draw((2, 40, 2, 32), 90, jnp.float32)
    q, k = q / 2, k / 2
    out = np.asarray(eight(q, k, v), np.float64)
    exact, lse = attention64(q, k, v)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, mean = k - k.mean(1, keepdims=True), v.mean(1, keepdims=True)
    v = v - mean
    size = np.einsum("bqhd,bkhd->bhqk", np.abs(q), np.abs(k)) * 32**-0.5
    tiny = 2.0**-9 * np.abs(v).max()  # what is too small for the format
    off = size * (2 * UNIT + UNIT**2) + 1e-3  # of a score
    grown = np.exp(2 * off.max(-1, keepdims=True)) * (1 + UNIT) ** 2 - 1  # of a weight times v
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) * 32**-0.5)
    weights /= weights.sum(-1, keepdims=True)
    moved = np.einsum("bhqk,bkhd->bqhd", weights * grown, np.abs(v)) + tiny
    bound = moved + UNIT * (np.abs(exact - mean) + moved) + tiny
    assert (np.abs(out - exact) <= bound).all()
    assert (np.abs(out - exact)).max() > 0.02 * bound.max()  # a bound that says something


def test_hidden_keys_have_no_part_even_where_most_are_hidden():
    q, k, v, _, _ = draw((2, 20, 2, 64), 500, jnp.float32)
    mask = np.zeros((2, 500), bool)
    mask[0, 490:], mask[1, 7] = True, True
    out = eight(q, k, v, mask)
    hidden = ~mask[:, :, None, None]
    np.testing.assert_array_equal(
        out, eight(q, jnp.where(hidden, 1e4, k), jnp.where(hidden, np.nan, v), mask))
    assert distance(out, attention64(q, k, v, mask)[0]) < 0.06
    np.testing.assert_allclose(out[1], jnp.broadcast_to(v[1, 7], out[1].shape), rtol=1e-6)


def test_a_batch_gives_what_its_samples_give_alone():
    q, k, v, _, _ = draw((2, 20, 2, 32), 50, jnp.float32)
    grow = jnp.array([1.0, 6.0])[:, None, None, None]
    together = eight(q, k * grow, v * grow)
    for i in range(2):
        alone = eight(*(x[i : i + 1] for x in (q, k * grow, v * grow)))
        np.testing.assert_allclose(together[i], alone[0], atol=2e-3 * float(np.abs(alone).max()))
    vmapped = jax.vmap(lambda *a: eight(*(x[None] for x in a))[0])(q, k * grow, v * grow)
    np.testing.assert_allclose(vmapped, together, atol=2e-3 * float(np.abs(together).max()))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_is_not_hidden(bad):
    q, k, v, _, _ = draw((1, 20, 1, 16), 20, jnp.float32)
    for i, x in enumerate((q, k, v)):
        args = [q, k, v]
        args[i] = x.at[0, 3, 0, 2].set(bad)
        assert np.isnan(np.asarray(eight(*args))).all()


def test_scales_are_powers_of_two_that_fit():
    for largest in (1e-38, 3.0, 448.0, 449.0, 2e30):
        values, scale = fp8.rounded(jnp.asarray([largest, -largest / 3]))
        mantissa, _ = np.frexp(scale)
        assert mantissa == 0.5
        assert largest < 1e-30 or 224 <= float(values[0]) <= 448
    assert (np.asarray(fp8.rounded(jnp.zeros(3)).values, np.float32) == 0).all()


def test_it_has_no_gradient_and_says_so():
    q, k, v, _, _ = draw((1, 20, 1, 16), 20, jnp.float32)
    with pytest.raises(UserError, match="'cudnn_fp8' is for inference.*'auto'") as error:
        jax.grad(lambda q: eight(q, k, v).sum())(q)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dim, tokens, masked, sums", [
    (128, 256, False, False), (64, 256, True, True), (40, 200, False, True)])
def test_the_program_for_a_gpu_is_cudnns_in_eight_bits(dim, tokens, masked, sums):
    """Lowered, not compiled: what is handed to the kernel."""
    x = jax.ShapeDtypeStruct((1, tokens, 2, dim), jnp.bfloat16)
    mask = [jax.ShapeDtypeStruct((1, tokens), jnp.bool_)] if masked else []

    def run(q, k, v, mask=None):
        with choosing(backend="cudnn_fp8", hardware=H100):
            return attention(q, k, v, mask)

    text = jax.jit(run).trace(x, x, x, *mask).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "__cudnn$fmhaSoftmaxF8" in line]
    width = -(-dim // 16) * 16
    assert call.count(f"tensor<1x256x2x{width}xf8E4M3FN>") >= 3
    assert ("tensor<1x2x256xf32>" in call) == sums
