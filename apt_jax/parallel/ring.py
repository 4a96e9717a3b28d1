"""Ring attention: keys travel around a ring of devices, a softmax is put together from its parts.

Every device keeps its queries and its block of keys and values. In each of R turns it attends to
the block it holds while that block moves on to its neighbour; the parts are joined by their
log-sum-exps (the online softmax). The backward pass sends the blocks around once more, each with
the gradient it collects on the way, so that nothing but q, k, v, the result and its log-sum-exp is
kept.

What a turn computes is a `Block`, plain JAX here, a fast kernel elsewhere. With the plain block
everything is differentiable twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SCORES = 2**27  # scores of the plain block that lie in memory at once: 512 MiB
MASKED = -1e30  # finite: a block without a single key must not make NaN, its weight is exp(-1e30)


class Block(NamedTuple):
    """Attention to one block of keys.

    forward(q, k, v, key_mask) -> (out [B, Nq, h, d], lse float32 [B, h, Nq]); a row without a key
      has an lse below -1e29.
    backward(q, k, v, key_mask, out, lse, dout) -> (dq, dk, dv); out and lse are those of the whole
      softmax, of which this block is a part.
    key_mask: bool [B, Nk] or None. Results are q's dtype or float32.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def _scores(q, k, key_mask):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    if key_mask is None:
        return scores
    return jnp.where(key_mask[:, None, None, :], scores, MASKED)


def _weights(scores, lse, key_mask):
    """[B, h, Nq, Nk]; nothing for a masked key, also where no key at all is to be seen."""
    weights = jnp.exp(scores - lse[..., None])
    return weights if key_mask is None else jnp.where(key_mask[:, None, None, :], weights, 0)


def _dense_forward(q, k, v, key_mask):
    scores = _scores(q, k, key_mask)  # [B, h, Nq, Nk]
    lse = jax.nn.logsumexp(scores, axis=-1)  # [B, h, Nq]
    weights = _weights(scores, lse, key_mask)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v,
                     preferred_element_type=jnp.float32)
    return out, lse


def _dense_backward(q, k, v, key_mask, out, lse, dout):
    f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = _weights(_scores(q, k, key_mask), lse, key_mask)  # of the whole softmax
    dweights = f32("bqhd,bkhd->bhqk", dout, v)
    delta = f32("bqhd,bqhd->bhq", dout, out)
    dscores = (weights * (dweights - delta[..., None]) * (q.shape[-1] ** -0.5)).astype(q.dtype)
    return (f32("bhqk,bkhd->bqhd", dscores, k), f32("bhqk,bqhd->bkhd", dscores, q),
            f32("bhqk,bqhd->bkhd", weights.astype(dout.dtype), dout))


def _query_chunk(q, k) -> int:
    """How many queries at a time keep the scores within SCORES; a multiple of 128, or all."""
    rows = SCORES // (q.shape[0] * q.shape[2] * k.shape[1]) // 128 * 128
    return min(q.shape[1], max(128, rows))


def _cut(x, chunk, axis=1):
    """[.., N, ..] -> [chunks, .., chunk, ..], zeros behind the last."""
    count = -(-x.shape[axis] // chunk)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * chunk - x.shape[axis])
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1:]), axis, 0)


def _uncut(x, length, axis=1):
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2:])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _plain_forward(q, k, v, key_mask):
    chunk, length = _query_chunk(q, k), q.shape[1]
    if chunk == length:
        return _dense_forward(q, k, v, key_mask)
    out, lse = jax.lax.map(lambda part: _dense_forward(part, k, v, key_mask), _cut(q, chunk))
    return _uncut(out, length), _uncut(lse, length, axis=2)


def _plain_backward(q, k, v, key_mask, out, lse, dout):
    chunk, length = _query_chunk(q, k), q.shape[1]
    if chunk == length:
        return _dense_backward(q, k, v, key_mask, out, lse, dout)

    def body(carry, part):  # queries behind the last have dout = 0 and give nothing
        q, out, lse, dout = part
        dq, *more = _dense_backward(q, k, v, key_mask, out, lse, dout)
        return tuple(jnp.add(*pair) for pair in zip(carry, more, strict=True)), dq

    zero = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(
        body, zero, (_cut(q, chunk), _cut(out, chunk), _cut(lse, chunk, axis=2), _cut(dout, chunk)))
    return _uncut(dq, length), dk, dv


PLAIN = Block(_plain_forward, _plain_backward)


def _join(out, lse, more, more_lse):
    """Two partial softmaxes as one: float32 out [B, Nq, h, d], lse [B, h, Nq]."""
    both = jnp.logaddexp(lse, more_lse)
    share = lambda part: jnp.swapaxes(jnp.exp(part - both), 1, 2)[..., None]  # noqa: E731
    return out * share(lse) + more.astype(jnp.float32) * share(more_lse), both


def ring_attention(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, *,
                   axis: str, size: int, block: Block = PLAIN) -> jax.Array:
    """Attention of this device's queries to the keys of all devices of the ring; in a shard_map.

    Args:
      q, k, v: [B, N, h, d], this device's part of the tokens.
      key_mask: bool [B, size, N], for the keys of every device, or None.
      axis, size: the mesh axis of the ring and its length.
      block: what computes one turn.
    Returns: [B, N, h, d] in q's dtype.
    """
    return _ring(q, k, v, key_mask, axis, size, block)


def _pass_on(axis, size, *arrays):
    """Each array to the next device of the ring."""
    there = [(i, (i + 1) % size) for i in range(size)]
    return tuple(jax.lax.ppermute(a, axis, there) for a in arrays)


def _mask_of(key_mask, axis, size, turn):
    """The mask of the block that is here in this turn: it set out `turn` devices before us."""
    if key_mask is None:
        return None
    owner = (jax.lax.axis_index(axis) - turn) % size
    return jax.lax.dynamic_index_in_dim(key_mask, owner, axis=1, keepdims=False)  # [B, N]


def _forward(q, k, v, key_mask, axis, size, block):
    out = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full((q.shape[0], q.shape[2], q.shape[1]), MASKED, jnp.float32)

    def attend(out, lse, k, v, turn):
        return _join(out, lse, *block.forward(q, k, v, _mask_of(key_mask, axis, size, turn)))

    def body(carry, turn):
        out, lse, k, v = carry
        coming = _pass_on(axis, size, k, v)  # under way while this turn computes
        return (*attend(out, lse, k, v, turn), *coming), None

    (out, lse, k, v), _ = jax.lax.scan(body, (out, lse, k, v), jnp.arange(size - 1))
    out, lse = attend(out, lse, k, v, size - 1)
    # Named, so that a rematerialisation policy can keep them (nn/stack.py).
    return checkpoint_name(out.astype(q.dtype), "attention_out"), checkpoint_name(
        lse, "attention_lse")


def _backward(q, k, v, key_mask, out, lse, dout, axis, size, block):
    def attend(dq, k, v, dk, dv, turn):
        mask = _mask_of(key_mask, axis, size, turn)
        add = block.backward(q, k, v, mask, out, lse, dout)
        return tuple(x + y.astype(jnp.float32) for x, y in zip((dq, dk, dv), add, strict=True))

    def body(carry, turn):
        dq, k, v, dk, dv = carry
        coming = _pass_on(axis, size, k, v)
        dq, dk, dv = attend(dq, k, v, dk, dv, turn)
        return (dq, *coming, *_pass_on(axis, size, dk, dv)), None

    zero = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    (dq, k, v, dk, dv), _ = jax.lax.scan(
        body, (zero[0], k, v, *zero[1:]), jnp.arange(size - 1))
    dq, dk, dv = attend(dq, k, v, dk, dv, size - 1)
    dk, dv = _pass_on(axis, size, dk, dv)  # home again
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(q, k, v, key_mask, axis, size, block):
    return _forward(q, k, v, key_mask, axis, size, block)[0]


def _ring_forward(q, k, v, key_mask, axis, size, block):
    out, lse = _forward(q, k, v, key_mask, axis, size, block)
    return out, (q, k, v, key_mask, out, lse)


def _ring_backward(axis, size, block, kept, dout):
    q, k, v, key_mask, out, lse = kept
    return (*_backward(q, k, v, key_mask, out, lse, dout, axis, size, block), None)


_ring.defvjp(_ring_forward, _ring_backward)
