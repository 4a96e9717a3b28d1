"""Attention kernels of others, wrapped so that any request fits: cuDNN, tokamax's, TPU splash.

Each takes and returns what `kernels.attention.attention` does, and can be differentiated once. What
was not padded and ordered outside the layers (`dispatch.whole`) is so here, in every layer.
Imported by name only where asked for: tokamax is optional.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from apt_jax.kernels.fit import batched_with, in_front, lengths, pad_tokens
from apt_jax.kernels.oracle import zero_without_keys

TOKAMAX_TILE = 128  # its gradients want multiples of 8 keys; whole tiles spare masking inside
CUDNN_TILE = 2  # its gradients refuse odd lengths
SPLASH_TILES = (512, 128)  # tokens of a block: the first that the sequence fills


def splash_tile(count: int) -> int:
    """Tokens of splash attention's blocks for so many queries or keys."""
    return next((tile for tile in SPLASH_TILES if count >= tile), SPLASH_TILES[-1])


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, *,
          hidden_last: bool = False) -> jax.Array:
    """cuDNN's fused attention, through jax.nn."""
    b, queries = q.shape[:2]
    k, v, visible = _in_front(q, k, v, key_mask, CUDNN_TILE, hidden_last)
    # D's samples share one text, from which Wan's second k and v come.
    k, v = batched_with(k, q), batched_with(v, q)
    if visible is not None:  # a length of zero is no softmax; the row is zeroed below
        visible = (lengths(b, queries, q), batched_with(jnp.maximum(visible, 1), q))
    out = _cudnn(*(pad_tokens(x, CUDNN_TILE) for x in (q, k, v)), visible)
    return _finish(out, queries, key_mask, hidden_last)


def _cudnn_call(q, k, v, visible):
    if visible is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=visible[0], key_value_seq_lengths=visible[1],
        implementation="cudnn")


@jax.custom_vjp
def _cudnn(q, k, v, visible):
    """cuDNN's, its result and log-sum-exp named, so that a rematerialisation policy can keep them:
    without a name for the second the kernel would run again for it."""
    return _cudnn_call(q, k, v, visible)


def _cudnn_forward(q, k, v, visible):
    out, pull = jax.vjp(lambda q, k, v: _cudnn_call(q, k, v, visible), q, k, v)
    kept, tree = jax.tree.flatten(pull)
    named = checkpoint_name(out, "attention_out")
    kept = [named if x is out else
            checkpoint_name(x, "attention_lse") if x.ndim == 3 and x.dtype == jnp.float32 else x
            for x in kept]
    return named, jax.tree.unflatten(tree, kept)


_cudnn.defvjp(_cudnn_forward, lambda pull, gradient: (*pull(gradient), None))


def _in_front(q, k, v, key_mask, tile, hidden_last):
    """k and v with the visible keys in front, and their number, None where all of whole tiles are."""
    count = k.shape[1]
    k, v, visible = in_front(k, v, key_mask, hidden_last)
    return k, v, lengths(k.shape[0], count, q) if visible is None and count % tile else visible


def tokamax(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, *,
            hidden_last: bool = False) -> jax.Array:
    """tokamax's Pallas kernel for Hopper (Mosaic GPU)."""
    from tokamax import dot_product_attention

    prepare_tokamax()
    queries = q.shape[1]
    k, v, visible = _in_front(q, k, v, key_mask, TOKAMAX_TILE, hidden_last)
    out = dot_product_attention(
        *(pad_tokens(x, TOKAMAX_TILE) for x in (q, k, v)),
        key_value_seq_lengths=None if visible is None else jnp.maximum(visible, 1),
        implementation="mosaic")
    # Its log-sum-exp has no name: what keeps attention's result does not spare its second run.
    return _finish(checkpoint_name(out, "attention_out"), queries, key_mask, hidden_last)


@functools.cache
def prepare_tokamax() -> None:
    """Once: keeps tokamax from reading our command line, and from a page of log for each shape.

    It has absl flags; where nobody has parsed them it parses sys.argv itself, and stops at the first
    flag of ours. Their defaults are what is wanted.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logging.getLogger("absl").addFilter(
        lambda record: not record.getMessage().startswith("Autotuning cache miss"))


def splash(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, *,
           hidden_last: bool = False, interpret: bool = False) -> jax.Array:
    """JAX's splash attention for TPUs; padding is a segment of its own."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, queries, heads, dim = q.shape
    keys = k.shape[1]
    tile_q, tile_k = splash_tile(queries), splash_tile(keys)
    segments = None
    if key_mask is not None or queries % tile_q or keys % tile_k:
        seen = jnp.ones((b, keys), bool) if key_mask is None else key_mask
        # Queries are all of segment 1, so are the visible keys; hidden and padded keys are of 0.
        segments = kernel.SegmentIds(
            q=jnp.ones((b, queries + -queries % tile_q), jnp.int32),
            kv=pad_tokens(seen.astype(jnp.int32), tile_k))
    q, k, v = (jnp.swapaxes(pad_tokens(x, t), 1, 2)  # [B, heads, N, head_dim]
               for x, t in ((q * dim**-0.5, tile_q), (k, tile_k), (v, tile_k)))
    sizes = kernel.BlockSizes(
        block_q=tile_q, block_kv=tile_k, block_kv_compute=tile_k, block_q_dkv=tile_q,
        block_kv_dkv=tile_k, block_kv_dkv_compute=tile_k, block_q_dq=tile_q, block_kv_dq=tile_k)
    full = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads)
    with jax.ensure_compile_time_eval():
        attend = kernel.make_splash_mha_single_device(
            full, block_sizes=sizes, interpret=interpret, residual_checkpoint_name="attention_out")
    out = jax.vmap(attend)(q, k, v, segments)
    return _finish(jnp.swapaxes(out, 1, 2), queries, key_mask, hidden_last)


def _finish(out: jax.Array, queries: int, key_mask: jax.Array | None, hidden_last: bool) -> jax.Array:
    """out without padded queries, zeros where no key was visible; hidden_last: some key was."""
    out = out[:, :queries]
    return out if key_mask is None or hidden_last else zero_without_keys(out, key_mask)
