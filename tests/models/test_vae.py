"""The VAE by itself: sizes, chunks, causality, memory, statistics, bytes, files."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import TINY_VAE, relative_error

from apt_jax.errors import UserError
from apt_jax.media import to_uint8
from apt_jax.models.vae import (
    FrameDecoder,
    Tiling,
    VAEConfig,
    load_vae,
    make_vae,
    save_vae,
)
from apt_jax.models.vae.layers import attend
from apt_jax.models.vae.tiling import fade


def clip(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def coded(tiny_vae):
    """Pixels [1, 7, 12, 20, 3] with their latents, and latents with their pixels."""
    vae, params = tiny_vae
    x, z = clip(1, 7, 12, 20, 3), clip(1, 4, 3, 5, 3)
    return (x, np.asarray(jax.jit(vae.encode)(params, x)),
            z, np.asarray(jax.jit(partial(vae.decode, clamp=False))(params, z)))


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, nearest", [(0, 1), (2, 1), (3, 1), (4, 5), (48, 49), (50, 49),
                                             (83, 81), (-3, 1)])
def test_other_frame_counts_name_the_nearest(frames, nearest):
    with pytest.raises(UserError, match=f"not {frames}; the nearest count is {nearest}$"):
        VAEConfig().latent_frames(frames)


def test_the_published_sizes():
    config = VAEConfig()
    assert config.latent_shape(49, 720, 1280) == (13, 90, 160, 16)
    assert config.latent_shape(81, 480, 832) == (21, 60, 104, 16)
    assert config.latent_shape(1, 1024, 1024) == (1, 128, 128, 16)
    assert [config.pixel_frames(n) for n in (1, 2, 13, 21)] == [1, 5, 49, 81]


def test_pixels_that_do_not_fit_are_refused_before_they_are_encoded(tiny_vae):
    vae, params = tiny_vae
    with pytest.raises(UserError, match="height that is a multiple of 4, not 14; the nearest is"):
        jax.eval_shape(vae.encode, params, clip(1, 1, 14, 16, 3))
    with pytest.raises(UserError, match="width that is a multiple of 4, not 2; the nearest is 4"):
        jax.eval_shape(vae.encode, params, clip(1, 1, 16, 2, 3))
    with pytest.raises(UserError, match="1 \\+ 2k frames, not 4; the nearest count is 3"):
        jax.eval_shape(vae.encode, params, clip(1, 4, 16, 16, 3))
    with pytest.raises(UserError, match="chunk = 0"):
        jax.eval_shape(partial(vae.decode, chunk=0), params, clip(1, 1, 2, 2, 3))


# -- config ----------------------------------------------------------------------------------------


def test_config_round_trip_and_mistakes():
    assert VAEConfig.from_dict(json.loads(json.dumps(TINY_VAE.to_dict()))) == TINY_VAE
    with pytest.raises(UserError, match="no field 'bas'"):
        VAEConfig.from_dict({"bas": 3})
    for wrong in ({"base": "4"}, {"base": None}, {"blocks": 0}, {"multipliers": 3},
                  {"mean": ["a"] * 16}, {"std": [float("inf")] * 16}, {"temporal": [1, 1, 1]}):
        with pytest.raises(UserError, match="a VAE's config has .* which is not allowed"):
            VAEConfig.from_dict(wrong)
    with pytest.raises(UserError, match="temporal has 1 entries"):
        VAEConfig(temporal=(True,))
    with pytest.raises(UserError, match="mean has 1 entries for 16"):
        VAEConfig(mean=(0.0,))
    with pytest.raises(UserError, match="float16"):
        VAEConfig(dtype="float16")


@pytest.mark.parametrize("change", [
    {"is_residual": True}, {"patch_size": 2}, {"attn_scales": [0.5]}, {"out_channels": 12},
    {"decoder_base_dim": 256}, {"scale_factor_spatial": 16}, {"_class_name": "AutoencoderKL"},
])
def test_another_network_is_refused(change):
    assert VAEConfig.from_diffusers({"base_dim": 96, "z_dim": 16}) == VAEConfig()
    with pytest.raises(UserError, match="Wan 2.1"):
        VAEConfig.from_diffusers({"base_dim": 96, **change})


# -- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 9])
def test_chunks_equal_the_whole_clip(tiny_vae, coded, chunk):
    """One latent at a time is the default; 9 is more than the clip has: one pass without a past."""
    vae, params = tiny_vae
    x, z, latents, y = coded
    assert relative_error(jax.jit(partial(vae.encode, chunk=chunk))(params, x), z) < 2e-6
    decode = jax.jit(partial(vae.decode, chunk=chunk, clamp=False))
    assert relative_error(decode(params, latents), y) < 2e-6


def test_causal(tiny_vae, coded):
    """A frame changes its own latent and the later ones; a latent its own frames and the later."""
    vae, params = tiny_vae
    x, z, latents, y = coded
    changed = x.copy()
    changed[:, 4] += 1
    moved = np.abs(np.asarray(jax.jit(vae.encode)(params, changed)) - z).max(axis=(0, 2, 3, 4))
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-3).all()
    changed = latents.copy()
    changed[:, 2] += 1
    again = jax.jit(partial(vae.decode, clamp=False))(params, changed)
    moved = np.abs(np.asarray(again) - y).max(axis=(0, 2, 3, 4))
    assert (moved[:3] == 0).all() and (moved[3:] > 1e-3).all()


def test_a_clips_first_frame_is_an_image(tiny_vae, coded):
    vae, params = tiny_vae
    x, z, latents, y = coded
    assert relative_error(jax.jit(vae.encode)(params, x[:, :1]), z[:, :1]) < 2e-6
    decode = jax.jit(partial(vae.decode, clamp=False))
    assert relative_error(decode(params, latents[:, :1]), y[:, :1]) < 2e-6


def test_each_half_needs_its_own_parameters_alone(tiny_vae, coded):
    vae, params = tiny_vae
    encoding = {name: params[name] for name in ("encoder", "quant")}
    decoding = {name: params[name] for name in ("post_quant", "decoder")}
    assert jax.eval_shape(vae.encode, encoding, coded[0]).shape == coded[1].shape
    assert jax.eval_shape(vae.decode, decoding, coded[2]).shape == coded[3].shape
    drawn = jax.eval_shape(vae.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, vae.abstract(), params)


def test_memory_does_not_grow_with_length(tiny_vae):
    """Beyond input and output, a clip three times as long needs no more than its pixels again."""
    vae, params = tiny_vae

    def scratch(latents: int) -> tuple[int, int]:
        shape = jax.ShapeDtypeStruct((1, latents, 24, 24, 3), jnp.float32)
        compiled = jax.jit(vae.decode).lower(vae.abstract(), shape).compile()
        found = compiled.memory_analysis()
        return found.temp_size_in_bytes, found.output_size_in_bytes

    (short, little), (long, much) = scratch(5), scratch(17)
    assert much > 3 * little
    # The pixels are stacked, put in order and joined to the first frame's: at most three copies.
    assert long - short <= 3 * (much - little)
    # One pass over the same clip keeps all its activations.
    whole = jax.jit(partial(vae.decode, chunk=17)).lower(
        vae.abstract(), jax.ShapeDtypeStruct((1, 17, 24, 24, 3), jnp.float32)).compile()
    assert whole.memory_analysis().temp_size_in_bytes > 2 * long


# -- numbers ---------------------------------------------------------------------------------------


def test_latents_are_normalised_and_pixels_clamped(tiny_vae, coded):
    vae, params = tiny_vae
    x, z, latents, y = coded
    mean = jax.jit(vae.moments)(params, x)[..., :3]
    want = (mean - np.array(TINY_VAE.mean)) / np.array(TINY_VAE.std)
    np.testing.assert_allclose(z, want, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(vae.normalise(vae.denormalise(z)), z, rtol=1e-5, atol=1e-6)
    assert np.abs(y).max() > 1.2
    assert np.array_equal(jax.jit(vae.decode)(params, latents), np.clip(y, -1, 1))


def test_bfloat16_computes_in_bfloat16(tiny_vae, coded):
    """No convolution or matrix product reads float32."""
    vae = make_vae(dataclasses.replace(TINY_VAE, dtype="bfloat16"))
    jaxpr = jax.make_jaxpr(partial(vae.decode, chunk=9))(tiny_vae[1], coded[2])
    seen = []
    for eqn in equations(jaxpr.jaxpr):
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            seen += [v.aval.dtype for v in eqn.invars]
    assert len(seen) > 20 and set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_both_forms_of_convolution_are_equal(tiny_vae, coded):
    vae = make_vae(dataclasses.replace(TINY_VAE, convolution="volume"))
    z, y = coded[2:]
    assert relative_error(jax.jit(partial(vae.decode, clamp=False))(tiny_vae[1], z), y) < 2e-6
    with pytest.raises(UserError, match="'frames' or 'volume'"):
        dataclasses.replace(TINY_VAE, convolution="3d")


@pytest.mark.parametrize("limit", [10**9, 40, 17])
def test_attention_in_blocks(monkeypatch, limit):
    """However few scores are allowed at a time, with and without padding keys."""
    monkeypatch.setattr("apt_jax.models.vae.layers.SCORES", limit)
    q, k, v = clip(2, 7, 4), clip(2, 9, 4), clip(3, 9, 4)[:2]
    for mask in (None, np.arange(9) < 6):
        scores = np.einsum("nqc,nkc->nqk", q, k) / 2
        weights = np.exp(scores if mask is None else np.where(mask, scores, -np.inf))
        expected = np.einsum("nqk,nkc->nqc", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(attend(q, k, v, mask), expected, rtol=2e-5, atol=1e-6)


# -- tiles -----------------------------------------------------------------------------------------


def test_fade_by_hand():
    before = np.full((1, 1, 5, 1, 1), 8.0, np.float32)
    tile = np.zeros((1, 1, 4, 1, 1), np.float32)
    assert fade(before, tile, 4, 2).ravel().tolist() == [8, 6, 4, 2]
    assert fade(before, tile, 2, 2).ravel().tolist() == [8, 4, 0, 0]
    assert fade(before[:, :, :1], tile, 4, 2).ravel().tolist() == [8, 0, 0, 0]
    assert fade(before, tile, 0, 2) is tile


def test_a_picture_that_fits_a_tile_is_not_cut(tiny_vae, coded):
    vae, params = tiny_vae
    decode = jax.jit(partial(vae.decode, clamp=False, tiling=Tiling(12, 20, 8, 8)))
    assert np.array_equal(decode(params, coded[2]), coded[3])


def test_tiles_that_do_not_fit_are_refused(tiny_vae):
    vae, params = tiny_vae
    with pytest.raises(UserError, match="cannot lie 300 apart"):
        Tiling(stride_width=300)
    with pytest.raises(UserError, match="multiples of 4"):
        jax.eval_shape(partial(vae.decode, tiling=Tiling(10, 8, 8, 8)), params, clip(1, 1, 9, 9, 3))


# -- bytes -----------------------------------------------------------------------------------------


def test_frames_are_those_of_decode(tiny_vae):
    """Chunk by chunk, batches that do not come out even, and the count that progress is told."""
    vae, params = tiny_vae
    z = clip(3, 4, 3, 5, 3)
    told = []
    frames = FrameDecoder(vae, params, chunk=2, batch=2)(z, told.append)
    expected = to_uint8(jax.jit(vae.decode)(params, z))
    assert frames.dtype == np.uint8 and frames.shape == expected.shape == (3, 7, 12, 20, 3)
    assert np.abs(frames.astype(int) - expected).max() <= 1  # a value halfway between two bytes
    assert (frames != expected).mean() < 1e-3
    assert sum(told) == 21 and told == [6, 8, 3, 4]


def test_frames_of_tiles(tiny_vae):
    vae, params = tiny_vae
    z, tiling = clip(1, 1, 3, 5, 3), Tiling(12, 12, 12, 8)
    frames = FrameDecoder(vae, params, tiling=tiling)(z)
    expected = to_uint8(jax.jit(partial(vae.decode, tiling=tiling))(params, z))
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_frames_refuse_what_they_cannot_decode(tiny_vae):
    vae, params = tiny_vae
    decoder = FrameDecoder(vae, params)
    with pytest.raises(UserError, match="have 16 channels, the VAE takes 3"):
        decoder(clip(1, 1, 3, 5, 16))
    with pytest.raises(UserError, match="NaN"):
        decoder(np.full((1, 1, 3, 5, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="tiles and split"):
        FrameDecoder(vae, params, tiling=Tiling(), mesh=jax.make_mesh((1,), ("a",)), axis="a")


# -- files -----------------------------------------------------------------------------------------


def test_save_and_load(tiny_vae, tmp_path):
    vae, params = tiny_vae
    save_vae(tmp_path / "pipe" / "vae", TINY_VAE, params, {"licence": "Apache-2.0"})
    for path in (tmp_path / "pipe", tmp_path / "pipe" / "vae"):
        loaded, again = load_vae(path)
        assert loaded.config == TINY_VAE
        chex.assert_trees_all_equal(again, params)
    assert load_vae(path, "bfloat16")[0].config.dtype == "bfloat16"
    card = json.loads((path / "config.json").read_text())
    assert card["kind"] == "vae" and card["licence"] == "Apache-2.0"
    half = save_vae(tmp_path / "half", TINY_VAE, params, bfloat16=True)
    assert relative_error(*(load_vae(f)[1]["quant"]["kernel"] for f in (half, path))) < 5e-3


def test_folders_that_are_no_vae(tiny_vae, tmp_path):
    vae, params = tiny_vae
    with pytest.raises(UserError, match="there is no folder"):
        load_vae(tmp_path / "nothing")
    with pytest.raises(UserError, match="config.json"):
        load_vae(tmp_path)
    folder = save_vae(tmp_path / "vae", TINY_VAE, params)
    with pytest.raises(UserError, match="already holds"):
        save_vae(folder, TINY_VAE, params)
    fewer = {**params, "quant": {"kernel": params["quant"]["kernel"]}}
    with pytest.raises(UserError, match="lacks parameter 'quant/bias'"):
        save_vae(tmp_path / "new", TINY_VAE, fewer)
    assert not (tmp_path / "new").exists()

    card = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    wider = {**card, "vae": {**card["vae"], "base": 8}}
    for text, words in ((json.dumps({**card, "kind": "generator"}), "kind = 'generator'"),
                        (json.dumps(wider), "parameter 'decoder/conv_in/bias' is"),
                        ("{", "not valid JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_vae(folder)
    (folder / "config.json").write_text(json.dumps(card))
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_vae(folder)
