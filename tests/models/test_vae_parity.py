"""The VAE equals diffusers' AutoencoderKLWan and AutoencoderKLQwenImage: from a file and live."""

from __future__ import annotations

import json
from functools import partial

import chex
import jax
import numpy as np
import pytest
from live import FIXTURES, live_reference
from networks import relative_error
from safetensors import safe_open
from vae_reference_names import from_reference, our_name

from apt_jax.models.vae import Tiling, VAEConfig, make_vae
from apt_jax.models.vae.config import LATENTS_MEAN, LATENTS_STD
from apt_jax.models.vae.io import flat_names

FILE = FIXTURES / "vae.safetensors"
TOLERANCE = 2e-5  # the promise is 1e-3


@pytest.fixture(scope="module")
def stored():
    """(about, parameters, every other tensor) of the fixture."""
    with safe_open(FILE, "np") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    names = [k for k in tensors if k.startswith("weights.")]
    weights = {k.removeprefix("weights."): tensors.pop(k).astype(np.float32) for k in names}
    return about, from_reference(weights, about["blocks"]), tensors


@pytest.fixture(scope="module")
def vae(stored):
    vae = make_vae(VAEConfig(base=stored[0]["base"], blocks=stored[0]["blocks"]))
    chex.assert_trees_all_equal_shapes_and_dtypes(stored[1], vae.abstract())
    return vae


def test_the_fixture_is_small():
    assert FILE.stat().st_size < 1_500_000


@pytest.mark.parametrize("name", ["image", "clip", "row"])
def test_equals_the_stored_reference(stored, vae, name):
    _, params, tensors = stored
    z = jax.jit(vae.encode)(params, tensors[f"{name}.x"])
    y = jax.jit(partial(vae.decode, clamp=False))(params, tensors[f"{name}.z"])
    assert z.dtype == y.dtype == np.float32
    for ours, what in ((z, "encoded"), (y, "decoded")):
        expected = tensors[f"{name}.{what}"]
        assert ours.shape == expected.shape and expected.std() > 0.1
        error = relative_error(ours, expected)
        print(f"{name} {what}: relative error {error:.2e}")
        assert error < TOLERANCE


def test_tiles_equal_the_stored_tiled_reference(stored, vae):
    """A column of tiles of a clip, encoded; rows and columns of an image, decoded; and not because
    tiles do nothing."""
    about, params, tensors = stored
    tiling = Tiling(*about["tiles"])
    z = jax.jit(partial(vae.encode, tiling=tiling))(params, tensors["tiled.x"])
    y = jax.jit(partial(vae.decode, tiling=tiling, clamp=False))(params, tensors["tiled.z"])
    whole = jax.jit(partial(vae.decode, clamp=False))(params, tensors["tiled.z"])
    assert relative_error(z, tensors["tiled.encoded"]) < TOLERANCE
    assert relative_error(y, tensors["tiled.decoded"]) < TOLERANCE
    assert relative_error(whole, tensors["tiled.decoded"]) > 0.01


def test_a_mistake_would_show(stored, vae):
    """Rows and columns exchanged, or the frames in another order, are far beyond the tolerance."""
    _, params, tensors = stored
    decode = jax.jit(partial(vae.decode, clamp=False))
    turned = jax.tree.map(lambda k: k.swapaxes(-4, -3) if k.ndim > 3 else k, params)
    expected = tensors["clip.decoded"]
    assert relative_error(decode(turned, tensors["clip.z"]), expected) > 1e-2
    assert relative_error(decode(params, tensors["clip.z"])[:, ::-1], expected) > 1e-2


# -- live ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    return live_reference("vae_reference")


@pytest.mark.parametrize("name, base, blocks, size", [
    ("Wan", 8, 1, (2, 9, 24, 40)),
    ("QwenImage", 12, 2, (1, 1, 72, 24)),
])
def test_equals_the_live_reference(reference, name, base, blocks, size):
    """float32 within the tolerance; bfloat16 no further from float32 than PyTorch's own."""
    import torch

    model = reference.random_vae(name, 3, base, blocks)
    params = from_reference(reference.weights(model), blocks)
    x, z = reference.pixels(4, size), reference.latents(5, size)
    exact = reference.encode(model, x), reference.decode(model, z)
    model = model.to(torch.bfloat16)
    theirs = reference.encode(model, x), reference.decode(model, z)
    for dtype in ("float32", "bfloat16"):
        vae = make_vae(VAEConfig.from_diffusers(dict(model.config), dtype))
        assert vae.config == VAEConfig(base=base, blocks=blocks, dtype=dtype)
        ours = jax.jit(vae.encode)(params, x), jax.jit(partial(vae.decode, clamp=False))(params, z)
        for mine, other, best, way in zip(ours, theirs, exact, ("encode", "decode")):
            error, limit = relative_error(mine, best), TOLERANCE
            if dtype == "bfloat16":
                limit = 1.2 * relative_error(other, best)
                assert limit > 1e-3
            print(f"{name} {way} {dtype}: {error:.2e}, limit {limit:.2e}")
            assert error < limit


@pytest.mark.parametrize("name", ["Wan", "QwenImage"])
def test_the_full_size_has_every_name_and_shape(reference, name):
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, f"AutoencoderKL{name}")()
    vae = make_vae(VAEConfig.from_diffusers(dict(model.config)))
    ours = {k: v.shape for k, v in flat_names(vae.abstract()).items()}
    theirs = {our_name(k, 2): tuple(v.shape) for k, v in model.state_dict().items()}
    assert ours.keys() == theirs.keys()
    for key, shape in theirs.items():
        if key.endswith("scale"):
            assert ours[key] == shape[:1]
        else:
            assert ours[key] == ((*shape[2:], shape[1], shape[0]) if len(shape) > 1 else shape)
    assert vae.parameter_count() == 126_892_531
    assert tuple(model.config.latents_mean) == LATENTS_MEAN == vae.config.mean
    assert tuple(model.config.latents_std) == LATENTS_STD == vae.config.std
