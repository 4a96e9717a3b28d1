"""The VAE with its height over a mesh axis equals the VAE on one device."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from networks import relative_error

from apt_jax.errors import UserError
from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.media import to_uint8
from apt_jax.models.vae import FrameDecoder, decode_sharded, encode_sharded


def mesh(**axes: int):
    return jax.make_mesh(tuple(axes.values()), tuple(axes),
                         axis_types=(AxisType.Auto,) * len(axes))


def latents(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axes, axis, rows", [
    (dict(context=8), "context", 16),  # two rows each
    (dict(replica=2, fsdp=4), "fsdp", 10),  # three rows each, two of the last device's are padding
], ids=["even", "padded"])
def test_decode_equals_one_device(tiny_vae, axes, axis, rows):
    vae, params = tiny_vae
    z = latents(2, 3, rows, 5, 3)
    grid = mesh(**axes)
    batch = next((name for name in axes if name != axis), None)
    whole = jax.jit(partial(vae.decode, clamp=False))(params, z)
    split = jax.jit(partial(decode_sharded, vae, mesh=grid, axis=axis, batch_axes=batch,
                            clamp=False))(params, z)
    assert split.shape == whole.shape == (2, 5, 4 * rows, 20, 3)
    error = relative_error(split, whole)
    print(f"relative error {error:.1e}")
    assert error < 2e-6  # the promise is 1e-5
    if rows == 16:
        assert split.sharding.spec[2] == axis  # nothing was gathered


def test_encode_equals_one_device(tiny_vae):
    vae, params = tiny_vae
    x = np.clip(latents(1, 5, 20, 12, 3), -1, 1)  # five latent rows on four devices
    whole = jax.jit(vae.encode)(params, x)
    split = jax.jit(partial(encode_sharded, vae, mesh=mesh(a=2, b=4), axis="b"))(params, x)
    assert split.shape == whole.shape == (1, 3, 5, 3, 3)
    assert relative_error(split, whole) < 2e-6


def test_a_kernel_may_serve_the_attention_of_the_middle(tiny_vae):
    """Traced for a GPU, where frames of more than 256 places take our kernel."""
    vae, params = tiny_vae
    z = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), np.float32)
    with choosing(hardware=Hardware("gpu", "NVIDIA H200", 9.0), backend="pallas"):
        traced = jax.make_jaxpr(partial(decode_sharded, vae, mesh=mesh(a=8), axis="a"))(params, z)
    assert "pallas_call" in str(traced)


def test_only_rows_and_the_middle_travel(tiny_vae):
    """The halo moves by collective-permute; only the middle's keys and values are gathered."""
    vae, params = tiny_vae
    z = latents(1, 2, 16, 5, 3)
    program = jax.jit(partial(decode_sharded, vae, mesh=mesh(a=8), axis="a"),
                      in_shardings=(None, jax.NamedSharding(mesh(a=8), PartitionSpec(
                          None, None, "a"))))
    text = program.lower(params, z).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert "collective-permute" in text and "all-reduce(" not in text
    assert 2 <= len(gathers) <= 4  # keys and values, in the first chunk and in the scan
    assert all("[1,80,8]" in line for line in gathers)


def test_frames_over_a_mesh(tiny_vae):
    """Five rows on eight devices: three idle."""
    vae, params = tiny_vae
    z = latents(2, 2, 5, 3, 3)
    frames = FrameDecoder(vae, params, mesh=mesh(a=8), axis="a")(z)
    expected = to_uint8(jax.jit(vae.decode)(params, z))
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_an_axis_that_is_not_there(tiny_vae):
    vae, params = tiny_vae
    with pytest.raises(UserError, match="no axis 'rows'; its axes are a, b"):
        decode_sharded(vae, params, latents(1, 1, 2, 2, 3), mesh=mesh(a=2, b=4), axis="rows")
