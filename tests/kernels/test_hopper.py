"""Our Hopper kernel by jax's interpreter of Mosaic GPU, against float64: tiles, copies, barriers, masks.

Products, layouts and positions are plain JAX there (`kernels/hopper/machine.py`); that the kernel
compiles for H100 and does not wait between products is seen by tests/bench/test_device_less.py. The
interpreter of jax 0.10 takes seconds for a tile, so there are few.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import attention64, draw
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    reset_gpu_interpret_mode_state,
)
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.kernels.hopper import machine
from apt_jax.kernels.hopper.attention import flash_attention, hopper


def near(found, wanted, most=6e-3):
    """Half a unit of the last place is 2e-3 in bfloat16."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(found - wanted) < most * np.linalg.norm(wanted)


def test_masks_and_odd_lengths_with_gradients():
    """Three tiles of keys in two slots, hidden keys anywhere, a sample without any."""
    q, k, v, dout, _ = draw((2, 70, 1, 64), 300, jnp.bfloat16)
    mask = np.random.default_rng(5).random((2, 300)) < 0.9
    mask[1] = False
    out, pull = jax.vjp(lambda *a: hopper(*a, jnp.asarray(mask), interpret=True), q, k, v)
    grads = pull(dout)
    want_out, _, want = attention64(q, k, v, mask, dout)
    for x, w in zip((out, *grads), (want_out, *want), strict=True):
        assert x.dtype == jnp.bfloat16 and x.shape == w.shape
        near(x[0], w[0])
        np.testing.assert_array_equal(np.asarray(x[1], np.float32), 0)


def test_whole_tiles_of_two_heads_with_the_gradient_of_the_log_sum_exp():
    """Heads of 128 without a count: what the loop does without any mask."""
    q, k, v, dout, dlse = draw((1, 128, 2, 128), 128, jnp.float16)
    (out, lse), pull = jax.vjp(lambda *a: flash_attention(*a, interpret=True), q, k, v)
    grads = pull((dout, dlse))
    want_out, want_lse, want = attention64(q, k, v, None, dout, dlse)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6, rtol=1e-5)
    for x, w in zip((out, *grads), (want_out, *want), strict=True):
        near(x, w, 8e-4)


@pytest.mark.parametrize("queries, keys, batch", [(1, 131, 1), (257, 389, 1), (197, 197, 2)],
                         ids=["one query", "primes", "text behind video"])
def test_heads_of_128_in_bfloat16(queries, keys, batch):
    """The 8B preset's: one query, prime lengths with more tiles than slots, and joint text and video
    where each sample hides the last of its words."""
    q, k, v, dout, _ = draw((batch, queries, 1, 128), keys, jnp.bfloat16)
    mask = None
    if batch > 1:
        mask = np.ones((batch, keys), bool)
        mask[0, -2:], mask[1, -5:] = False, False
    out, pull = jax.vjp(lambda *a: hopper(*a, mask, interpret=True), q, k, v)
    want, _, grads = attention64(q, k, v, mask, dout)
    for x, w in zip((out, *pull(dout)), (want, *grads), strict=True):
        near(x, w)


def test_hidden_keys_have_no_influence():
    """The last keys hidden, as a network that orders its text says; nothing of theirs is even read
    but in the tile that they share with others."""
    q, k, v, _, _ = draw((1, 128, 1, 64), 256, jnp.bfloat16)
    seen = jnp.arange(256)[None] < 100
    run = lambda k, v: hopper(q, k, v, seen, hidden_last=True, interpret=True)  # noqa: E731
    out = run(k, v)
    near(out, attention64(q, k, v, seen)[0])
    hidden = ~seen[:, :, None, None]
    np.testing.assert_array_equal(
        run(jnp.where(hidden, 1e4, k).astype(k.dtype), jnp.where(hidden, -1e4, v).astype(v.dtype)), out)


@pytest.fixture
def races(monkeypatch):
    """The interpreter looks for accesses of shared memory that no barrier orders, and prints them."""
    params = dataclasses.replace(machine._interpreter(), detect_races=True)
    monkeypatch.setattr(machine, "_interpreter", lambda: params)
    jax.clear_caches()  # programs of other tests do not look
    yield params
    jax.clear_caches()


def test_copies_wait_for_those_who_read(races, capsys):
    """More tiles than slots in all three kernels; the last tile of keys has hidden ones."""
    q, k, v, dout, _ = draw((1, 256, 1, 64), 384, jnp.bfloat16)
    seen = jnp.arange(384)[None] < 300
    out, pull = jax.vjp(lambda *a: hopper(*a, seen, hidden_last=True, interpret=True), q, k, v)
    want, _, grads = attention64(q, k, v, seen, dout)
    for x, w in zip((out, *pull(dout)), (want, *grads), strict=True):
        near(x, w)
    assert "RACE" not in capsys.readouterr().out


def test_a_read_that_waits_for_nothing_is_seen(races, capsys):
    """The search of the test above finds something where there is something."""
    def body(x_ref, out_ref, tile, ready):
        @pl.when(jax.lax.axis_index("wg") == 0)
        def _():
            plgpu.copy_gmem_to_smem(x_ref, tile, ready)

        @pl.when(jax.lax.axis_index("wg") == 1)
        def _():
            out_ref[...] = tile[...]

    x = jnp.ones((64, 64), jnp.float32)
    run = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), num_threads=2,
                       thread_name="wg", interpret=races,
                       scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()])
    said = ""
    try:
        jax.block_until_ready(run(x))
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 raises what others print
        said = str(error)
        reset_gpu_interpret_mode_state()
    assert "RACE DETECTED" in said + capsys.readouterr().out


def test_dispatch_pads_asks_and_refuses():
    q, k, v, _, _ = draw((1, 20, 1, 64), 30, jnp.bfloat16)
    with choosing(backend="hopper"), dispatch.recording() as seen:
        near(dispatch.run(q, k, v), attention64(q, k, v)[0])
        assert seen == {"hopper"}
        with pytest.raises(UserError, match="64 or 128 channels, not 32"):
            dispatch.run(*(x[..., :32] for x in (q, k, v)))
        with pytest.raises(UserError, match="no float32; set model.dtype"):
            dispatch.run(*(x.astype(jnp.float32) for x in (q, k, v)))
    with choosing(backend="hopper", hardware=Hardware("gpu", "NVIDIA A100", 8.0)):
        with pytest.raises(UserError, match="for Hopper GPUs, and this is a NVIDIA A100"):
            dispatch.run(q, k, v)


def test_a_second_derivative_is_refused():
    q, k, v, _, _ = draw((1, 128, 1, 64), 128, jnp.bfloat16)

    def squared(q):
        slope = jax.grad(lambda q: flash_attention(q, k, v, interpret=True)[0].astype(
            jnp.float32).sum())(q)
        return (slope.astype(jnp.float32) ** 2).sum()

    with pytest.raises(UserError, match="'hopper' can be differentiated once"):
        jax.jit(jax.grad(squared)).trace(q)
