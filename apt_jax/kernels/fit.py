"""Making a request fit a kernel that takes whole tiles and lengths, not masks.

A network that asks `dispatch.whole` does it once, outside its layers; for all others `peers` does it
inside, with every attention.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """Tokens with the visible ones in front, both kinds as they followed one another.

    order, back: int32 [B, N], the token of each place and the place of each token. count: int32
    [B], how many are visible.
    """

    order: jax.Array
    back: jax.Array
    count: jax.Array


def pad_tokens(x: jax.Array, multiple: int) -> jax.Array:
    """x [B, N, ...] with zeros up to the next multiple of tokens."""
    return add_tokens(x, -x.shape[1] % multiple)


def add_tokens(x: jax.Array, count: int) -> jax.Array:
    """x [B, N, ...] with `count` tokens of zeros (False) behind it."""
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2)) if count else x


def visible_first(key_mask: jax.Array) -> Order:
    """The order for a mask, bool [B, N].

    No softmax notices the order of its keys, and a length is all that the kernels take (as a mask,
    cuDNN and tokamax would want the whole [Nq, Nk]).
    """
    count = key_mask.sum(axis=1, dtype=jnp.int32)
    seen, unseen = (jnp.cumsum(m, axis=1, dtype=jnp.int32) - 1 for m in (key_mask, ~key_mask))
    back = jnp.where(key_mask, seen, count[:, None] + unseen)  # each key's place, [B, Nk]
    here = jnp.broadcast_to(jnp.arange(back.shape[1], dtype=jnp.int32), back.shape)
    order = jax.vmap(lambda at, key: jnp.zeros_like(at).at[at].set(key, unique_indices=True))(
        back, here)  # the key of each place
    return Order(order, back, count)


def in_front(k: jax.Array, v: jax.Array, key_mask: jax.Array | None, hidden_last: bool
             ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """k and v with the visible keys in front, and their number, int32 [B], None where all are.

    hidden_last: they are in front already.
    """
    if key_mask is None:
        return k, v, None
    if hidden_last:
        return k, v, key_mask.sum(axis=1, dtype=jnp.int32)
    order = visible_first(key_mask)
    return reorder(k, order), reorder(v, order), order.count


def reorder(x: jax.Array, order: Order) -> jax.Array:
    """x [B, N, ...] in that order."""
    return _reorder(x, order.order, order.back)


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """x[b, order[b]]; its gradient reads too, in the opposite order, where a scatter would write."""
    return _taken(x, order)


def _reorder_forward(x, order, back):
    return _reorder(x, order, back), back


def _reorder_backward(back, gradient):
    return _taken(gradient, back), None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)


def _taken(x, index):
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def lengths(batch: int, count: int, like: jax.Array) -> jax.Array:
    """int32 [B], all `count`. It hangs on `like` [B, ...], so that it is batched where that is:
    cuDNN's rule for vmap wants all of its operands batched."""
    return jnp.full((batch,), count, jnp.int32) + _no(like)


def batched_with(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [B, ...] unchanged, batched where `like` [B, ...] is. XLA leaves the sum with zero away."""
    return x + _no(like).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _no(like: jax.Array) -> jax.Array:
    return jnp.zeros((), jnp.int32) * (like.reshape(like.shape[0], -1)[:, 0] > 0)
