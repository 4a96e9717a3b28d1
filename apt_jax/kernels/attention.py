"""Scaled dot-product attention: the one entry of all models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp

from apt_jax.kernels import dispatch, scope


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None, *,
    hidden_last: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v with a float32 softmax, on whatever mesh the network is on.

    Args:
      q: [B, Nq, heads, head_dim]; k, v: [B, Nk, heads, head_dim]; float32 or bfloat16.
      key_mask: bool [B, Nk], False for keys that nobody may look at; None for no padding. A row with
        no key left is zeros, without a gradient.
      hidden_last: the caller's word that key_mask is True for each sample's first keys, one or more,
        and False behind them, which spares kernels that take lengths (`dispatch.whole`) moving the
        keys.
    Returns: [B, Nq, heads, head_dim] in q's dtype. Differentiable once; any number of times by the
      oracle, which `kernels.choice.choosing(derivatives=2)` asks for.
    """
    mesh = scope.current()
    if mesh is not None:
        return mesh.attention((q,), (k,), (v,), key_mask, hidden_last=hidden_last)[0]
    return local_attention(q, k, v, key_mask, hidden_last=hidden_last)


def joint_attention(
    q: Sequence[jax.Array],
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    key_mask: jax.Array | None = None,
    *,
    hidden_last: bool = False,
) -> list[jax.Array]:
    """`attention` of several streams (text, video) over the tokens of all of them together.

    Args:
      q, k, v: one [B, N_i, heads, head_dim] per stream.
      key_mask: bool [B, sum of N_i], in the order of the streams.
      hidden_last: of the joined keys; see `attention`.
    Returns: one [B, N_i, heads, head_dim] per stream.
    """
    mesh = scope.current()
    if mesh is not None:
        return mesh.attention(q, k, v, key_mask, hidden_last=hidden_last)
    join = lambda parts: jnp.concatenate(parts, axis=1)  # noqa: E731
    ends = list(accumulate(part.shape[1] for part in q))
    out = local_attention(join(q), join(k), join(v), key_mask, hidden_last=hidden_last)
    return jnp.split(out, ends[:-1], axis=1)


def local_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None, *,
    hidden_last: bool = False,
) -> jax.Array:
    """`attention` on one device, by the kernel that `kernels.dispatch` chooses."""
    with jax.named_scope("attention"):  # plan tells its FLOPs from the other products by this name
        return dispatch.run(q, k, v, key_mask, hidden_last=hidden_last)
