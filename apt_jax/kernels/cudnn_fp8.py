"""Attention in eight bits by cuDNN, for inference on Hopper GPUs; a CPU computes the same rounding.

The kernel takes q, k and v in e4m3 with one scale each, rounds softmax's numerators to e4m3 before
they meet v, sums in float32 and returns e4m3. As jax hands it on it knows no mask and no lengths.
Four facts keep what that costs small:

* q . k does not change when both are multiplied by one orthogonal matrix. Where a few channels make
  most of it, only their few rounding errors could cancel; a Hadamard matrix spreads it over all.
* Softmax does not change when all keys move by one vector. With the visible keys' mean taken from
  them they need less of the format, and a query's visible scores have the mean 0, so that their
  exponentials sum to at least their number (Jensen). v's mean comes off too, and on again after.
* A key that is zero has the score 0. Hidden keys and padding are made zero, with their v: each adds
  1 to the sum of exponentials, which the kernel returns, and nothing to the result. That is
  multiplied by sum / (sum - their number), a factor between 1 and keys / visible keys.
* Scales are powers of two. What a number is rounded to does not depend on its neighbours, so a
  batch gives what its samples give alone, but for numbers too small for the format.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.errors import UserError
from apt_jax.kernels.fit import pad_tokens
from apt_jax.kernels.fp8 import E4M3, TINY
from apt_jax.kernels.oracle import zero_without_keys

TILE = 128  # tokens are filled up to multiples of it
CHANNELS = 16  # and heads to multiples of it
HEAD_DIM = 256  # the most that it takes
LIMIT = float(jnp.finfo(E4M3).max)
# Numerators lie between 0 and 1. Times 256 they keep the format's precision down to 6e-5 and vanish
# below 4e-6; times its limit they would have no room where the kernel has not seen a row's largest.
NUMERATORS = 256.0


class Rounded(NamedTuple):
    """x is about values * scale: values e4m3 like x, scale a float32 scalar."""

    values: jax.Array
    scale: jax.Array


def rounded(x: jax.Array) -> Rounded:
    """x [...] float -> e4m3; its scale is the smallest power of two that leaves all of it inside.

    With a NaN or an infinity in x everything becomes NaN: it is not hidden.
    """
    h = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(h))
    _, exponent = jnp.frexp(jnp.maximum(largest, TINY) / LIMIT)
    scale = jnp.ldexp(jnp.float32(1.0), exponent) + 0.0 * largest
    return Rounded((h / scale).astype(E4M3), scale)


def cudnn_fp8(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, *,
              emulate: bool = False) -> jax.Array:
    """`kernels.attention.attention` in eight bits, for heads of up to 256 channels of any dtype.

    emulate: the same rounding in float32 on any hardware, scores in memory. Two things differ from
      the kernel: it rounds numerators against the largest score that it has seen so far, this
      against the row's largest; and Hopper's tensor cores sum in fewer bits than float32.
    Raises UserError where it is differentiated.
    """
    return _attend(q, k, v, key_mask, emulate)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _attend(q, k, v, key_mask, emulate):
    dtype, queries, dim = q.dtype, q.shape[1], q.shape[3]
    (q, grown), (k, _) = _spread(q), _spread(k)
    sums = key_mask is not None or k.shape[1] % TILE != 0
    shown = jnp.ones(k.shape[:2], bool) if key_mask is None else key_mask
    (k, _), (v, mean) = _centred(k, shown), _centred(v, shown)
    q, k, v = (rounded(_filled(x)) for x in (q, k, v))
    run = _emulated if emulate else _cudnn
    # A mean of v's rows is no larger than they are: v's scale is the result's too.
    out, lse = run(q.values, k.values, v.values, q.scale, k.scale, v.scale,
                   dim**-0.5 / grown, sums)
    out = out[:, :queries, :, :dim].astype(jnp.float32) * v.scale
    if sums:
        out = out * _without_hidden(lse[:, :, :queries], shown, k.values.shape[1])
    out = (out + mean).astype(dtype)
    return out if key_mask is None else zero_without_keys(out, key_mask)


@_attend.defjvp
def _refuse(emulate, primals, tangents):
    raise UserError("the attention kernel 'cudnn_fp8' is for inference and has no gradient; set "
                    "model.attention to 'auto' for training")


def _spread(x: jax.Array) -> tuple[jax.Array, int]:
    """x [..., d] times a matrix of 1 and -1, and what it makes products of two such x larger by.

    A Hadamard matrix of random signs for each block of channels; blocks are the largest power of two
    that divides d. Its numbers are exact in every dtype.
    """
    dim = x.shape[-1]
    block = dim & -dim
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (dim, 1))
    matrix = jnp.asarray(signs * np.kron(np.eye(dim // block), hadamard), x.dtype)
    return jnp.dot(x, matrix, precision=jax.lax.Precision.HIGHEST), block


def _centred(x: jax.Array, shown: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, N, heads, d] less its mean over shown tokens, zero in the others; and that mean,
    [B, 1, heads, d]. Both float32."""
    seen = shown[:, :, None, None]
    h = jnp.where(seen, x.astype(jnp.float32), 0.0)
    mean = h.sum(axis=1, keepdims=True) / jnp.maximum(seen.sum(axis=1, keepdims=True), 1)
    return jnp.where(seen, h - mean, 0.0), mean


def _filled(x: jax.Array) -> jax.Array:
    """x [B, N, heads, d] with zeros up to whole tiles of tokens and channels."""
    x, more = pad_tokens(x, TILE), -x.shape[3] % CHANNELS
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))) if more else x


def _without_hidden(lse: jax.Array, shown: jax.Array, keys: int) -> jax.Array:
    """What takes keys of score 0 out of the result that it is multiplied by: [B, N, heads, 1].

    lse: float32 [B, heads, N], of all `keys`, hidden ones and padding among them.
    """
    count = shown.sum(axis=1)[:, None, None].astype(jnp.float32)
    hidden = keys - count
    # Rounding may lift the share above what Jensen allows.
    share = jnp.minimum(hidden * jnp.exp(-lse), hidden / (hidden + jnp.maximum(count, 1.0)))
    return jnp.swapaxes(1.0 / (1.0 - share), 1, 2)[..., None]


def _emulated(q, k, v, q_scale, k_scale, v_scale, softmax_scale, sums):
    """e4m3 [B, N, heads, d] -> e4m3 like q, to be multiplied by v_scale, and lse [B, heads, Nq]."""
    wide = (x.astype(jnp.float32) for x in (q, k))
    scores = jnp.einsum("bqhd,bkhd->bhqk", *wide) * (q_scale * k_scale * softmax_scale)
    largest = scores.max(axis=-1, keepdims=True)
    numerators = jnp.exp(scores - largest)
    total = numerators.sum(axis=-1)  # of what is not rounded
    weights = (numerators * NUMERATORS).astype(E4M3).astype(jnp.float32)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v.astype(jnp.float32))
    out = out / jnp.swapaxes(total * NUMERATORS, 1, 2)[..., None]
    return jnp.clip(out, -LIMIT, LIMIT).astype(E4M3), jnp.log(total) + largest[..., 0]


def _cudnn(q, k, v, q_scale, k_scale, v_scale, softmax_scale, sums):
    """The same by the kernel; lse None without `sums`."""
    fp8 = _primitive()

    @jax.custom_batching.sequential_vmap  # its own rule for vmap shares scales between samples
    def call(q, k, v, q_scale, k_scale, v_scale):
        one = lambda x: jnp.reshape(jnp.asarray(x, jnp.float32), (1, 1, 1, 1))  # noqa: E731
        # descales of q, k, v and the numerators, scales of the numerators and the result
        out, _, _, *rest = fp8.bind(
            q, k, v, one(q_scale), one(k_scale), one(v_scale), one(1 / NUMERATORS), one(NUMERATORS),
            one(1 / v_scale), scale=softmax_scale, use_causal_mask=False, layout=0,
            is_training=sums)
        return (out, *rest)

    out, *rest = call(q, k, v, q_scale, k_scale, v_scale)
    return out, rest[0] if sums else None


def available() -> bool:
    """Whether this jax has the kernel; it is none of its public functions."""
    try:
        return _primitive() is not None
    except (ImportError, AttributeError):
        return False


def _primitive():
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn._dot_product_attention_fp8_fwd_p_wrapper
