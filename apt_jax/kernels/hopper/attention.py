"""Flash attention for Hopper as one function that is differentiable once, for masks and any lengths."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from apt_jax.errors import UserError
from apt_jax.kernels.fit import in_front, lengths, pad_tokens
from apt_jax.kernels.flash.attention import SAVED, rowsum
from apt_jax.kernels.hopper import TILE
from apt_jax.kernels.hopper.backward import backward
from apt_jax.kernels.hopper.forward import forward
from apt_jax.kernels.hopper.machine import Machine
from apt_jax.kernels.oracle import zero_without_keys

# What compiles for H100 without spilling registers (but 8 bytes of dk and dv at 128 channels), or
# products that wait for one another, and fits its 227 KiB of shared memory. Not tuned on a GPU yet.
FORWARD = {"tile": TILE, "slots": 2}
BACKWARD = {"tile": 64, "slots": 2}


def hopper(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, *,
           hidden_last: bool = False, interpret: bool = False) -> jax.Array:
    """Attention as `kernels.attention.attention` takes and returns it: bfloat16 or float16, heads of
    64 or 128 channels.

    hidden_last: the mask hides the last keys of a sample, and not all. interpret: on a CPU, slowly.
    """
    queries, count = q.shape[1], k.shape[1]
    k, v, visible = in_front(k, v, key_mask, hidden_last)
    if visible is not None:
        visible = jnp.maximum(visible, 1)
    elif count % TILE:
        visible = lengths(k.shape[0], count, q)
    out, _ = flash_attention(*(pad_tokens(x, TILE) for x in (q, k, v)), visible, interpret=interpret)
    out = out[:, :queries]
    return out if key_mask is None or hidden_last else zero_without_keys(out, key_mask)


@functools.partial(jax.jit, static_argnames="interpret")
def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array | None = None, *,
                    interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Attention and its log-sum-exp over the first keys; differentiable once, in both results.

    Args:
      q: [B, Nq, heads, dim]; k, v: [B, Nk, heads, dim]; bfloat16 or float16; dim 64 or 128; Nq and Nk
        multiples of `TILE`.
      count: int32 [B], 1 to Nk, the visible keys, which are the first; None for all of them.
    Returns: out like q, lse float32 [B, heads, Nq] of the scaled scores.
    """
    return _flash(q, k, v, count, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, count, interpret):
    return forward(q, k, v, count, **FORWARD, machine=Machine(interpret))


def _flash_forward(q, k, v, count, interpret):
    out, lse = _flash(q, k, v, count, interpret)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED, strict=True))
    return (out, lse), (q, k, v, count, out, lse)


def _flash_backward(interpret, residuals, cotangents):
    q, k, v, count, out, lse = residuals
    dout, dlse = cotangents
    return *_once(q, k, v, count, dout, lse, rowsum(dout, out) - dlse, interpret), None


_flash.defvjp(_flash_forward, _flash_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _once(q, k, v, count, dout, lse, delta, interpret):
    return backward(q, k, v, count, dout, lse, delta, **BACKWARD, machine=Machine(interpret))


@_once.defjvp
def _twice(interpret, primals, tangents):
    raise UserError("the attention kernel 'hopper' can be differentiated once, and this asks for a "
                    "second derivative; use model.attention 'oracle'")
