"""Flash attention as one differentiable function, and its two halves for those who sum over blocks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from apt_jax.errors import UserError
from apt_jax.kernels.flash import tiles
from apt_jax.kernels.flash.backward import backward
from apt_jax.kernels.flash.forward import forward

# Names for remat policies: saving these two spares the backward pass a second forward.
SAVED = ("attention_out", "attention_lse")


@functools.partial(jax.jit, static_argnames="interpret")
def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None, *,
                    interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Attention and its log-sum-exp by our Pallas kernels; differentiable once, in both results.

    Args:
      q: [B, Nq, heads, head_dim]; k, v: [B, Nk, heads, head_dim]; one dtype: float32, bfloat16 or
        float16; any lengths.
      key_mask: bool [B, Nk], False for keys that nobody may look at.
      interpret: run on a CPU, slowly, what a GPU would run.
    Returns: out like q (zeros in a row without a key), lse float32 [B, heads, Nq] of the scaled
      scores (`tiles.EMPTY` in a row without a key).
    """
    return _flash(q, k, v, key_mask, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, key_mask, interpret):
    return forward(q, k, v, tiles.bias_of(key_mask), tiles.plan(q, k, interpret=interpret))


def _flash_forward(q, k, v, key_mask, interpret):
    out, lse = _flash(q, k, v, key_mask, interpret)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED))
    return (out, lse), (q, k, v, key_mask, out, lse)


def _flash_backward(interpret, residuals, cotangents):
    q, k, v, key_mask, out, lse = residuals
    dout, dlse = cotangents
    delta = rowsum(dout, out) - dlse
    return *_once(q, k, v, key_mask, dout, lse, delta, interpret), None


_flash.defvjp(_flash_forward, _flash_backward)


def rowsum(dout: jax.Array, out: jax.Array) -> jax.Array:
    """sum over channels of dout * out [B, N, heads, head_dim] -> float32 [B, heads, N]."""
    return jnp.einsum("bqhd,bqhd->bhq", dout, out, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames="interpret")
def flash_gradients(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None,
                    dout: jax.Array, lse: jax.Array, delta: jax.Array, *, interpret: bool = False
                    ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) of one block of keys, given lse and delta = `rowsum`(dout, out) of whole rows."""
    return _once(q, k, v, key_mask, dout, lse, delta, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _once(q, k, v, key_mask, dout, lse, delta, interpret):
    plan = tiles.plan(q, k, interpret=interpret)
    return backward(q, k, v, tiles.bias_of(key_mask), dout, lse, delta, plan)


@_once.defjvp
def _twice(interpret, primals, tangents):
    raise UserError("the attention kernel 'pallas' can be differentiated once, and this asks for a "
                    "second derivative; use model.attention 'oracle'")
