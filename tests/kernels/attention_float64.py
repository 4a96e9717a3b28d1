"""Attention and its gradients in float64 numpy, the measure of the kernels' tests."""

from __future__ import annotations

import numpy as np


def attention64(q, k, v, mask=None, dout=None, dlse=None):
    """out [B, N, h, d] and lse [B, h, N]; with dout (and dlse) also (dq, dk, dv).

    Rows without a key: zeros, lse -inf, no gradient.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        scores = np.where(np.asarray(mask)[:, None, None, :], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    weights = weights / np.where(total == 0, 1, total)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    if dout is None:
        return out, lse
    dout = np.asarray(dout, np.float64)
    dweights = np.einsum("bqhd,bkhd->bhqk", dout, v)
    delta = (weights * dweights).sum(-1, keepdims=True)
    if dlse is not None:
        delta = delta - np.asarray(dlse, np.float64)[..., None]
    dscores = weights * (dweights - delta) * scale
    return out, lse, (np.einsum("bhqk,bkhd->bqhd", dscores, k),
                      np.einsum("bhqk,bqhd->bkhd", dscores, q),
                      np.einsum("bhqk,bqhd->bkhd", weights, dout))


def draw(shape_q, keys, dtype, seed=0):
    """q like shape_q [B, N, h, d]; k, v with `keys` tokens; dout like q; dlse [B, h, N]: jax arrays."""
    import jax.numpy as jnp

    rng = np.random.default_rng(seed)
    b, n, h, d = shape_q
    q, k, v, dout = (jnp.asarray(rng.normal(size=(b, m, h, d)), dtype) for m in (n, keys, keys, n))
    return q, k, v, dout, jnp.asarray(rng.normal(size=(b, h, n)), jnp.float32)
