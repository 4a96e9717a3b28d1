"""Generators of latents from prompt to frames: sizes, the VAE's part, progress, errors."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from apt_jax import api
from apt_jax.cli import main as cli
from apt_jax.config import base_config
from apt_jax.diffusion.samplers import one_step
from apt_jax.errors import UserError
from apt_jax.eval.generate import sample_noise
from apt_jax.eval.latents import LatentSpace, decode_latents
from apt_jax.media import to_uint8
from apt_jax.models.presets import make_generator
from apt_jax.models.vae import FrameDecoder, VAEConfig, make_vae, save_vae
from apt_jax.tensor_files import write_json
from apt_jax.weights import save_generator

# 4x4 pixels and, after the first, 2 frames a latent.
VAE = VAEConfig(base=4, multipliers=(1, 2, 2), blocks=1, temporal=(False, True),
                latent_channels=3, mean=(0.5, -1.0, 0.0), std=(2.0, 0.5, 1.0))
TEXT = 6


class Encoder:
    """Stands in for the checkpoint's text encoder."""

    name, width = "test", TEXT

    def encode(self, captions, max_tokens):
        text = np.zeros((len(captions), max_tokens, TEXT), np.float32)
        for i, caption in enumerate(captions):
            text[i, 0] = len(caption)
        return text, np.arange(max_tokens) < np.ones((len(captions), 1))


def random(tree, seed=0):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda p: draw(scale=0.3, size=p.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A component folder with a tiny generator of 4-channel latents, and its VAE."""
    folder = tmp_path_factory.mktemp("base")
    vae = dataclasses.replace(VAE, latent_channels=4, mean=(0.5, -1.0, 0.0, 0.2),
                              std=(2.0, 0.5, 1.0, 1.0))
    write_json(folder / "config.json", {"kind": "pipeline", "family": "wan", "source": {}})
    model = base_config().model
    model.in_channels = model.out_channels = 4
    model.width, model.depth, model.heads, model.head_dim = 16, 1, 1, 16
    model.rope_axes, model.text_width = (4, 6, 6), TEXT
    save_generator(folder / "transformer", model.to_dict(),
                   random(make_generator(model).abstract()))
    save_vae(folder / "vae", vae, random(make_vae(vae).abstract()))
    return folder


@pytest.fixture(scope="module")
def generator(base):
    generator = api.load(base)
    generator.latents.text_encoder = Encoder()
    return generator


def test_a_sample_is_the_decoded_latent(generator):
    """Sizes are given in pixels; noise, network and VAE work on the latents of that size."""
    samples = generator.sample(["cat", "horse"], seed=3, frames=3, height=16, width=24,
                               latents=True)
    assert samples.frames.shape == (2, 3, 16, 24, 3) and samples.frames.dtype == np.uint8
    assert samples.settings["height"] == 16 and samples.settings["fps"] == 16
    generator.config.sample.fps = 24.0  # what the data's clips have, where the config says it
    assert generator._resolve("one_step", 0, 3, 16, 24, *[None] * 4)["fps"] == 24
    generator.config.sample.fps = 0.0
    assert samples.settings["batch"] == 1  # clips of a large model come one at a time

    z = sample_noise(3, np.arange(2), (2, 4, 6, 4))
    text, mask = Encoder().encode(["cat", "horse"], 512)
    latents = one_step(lambda *a: generator.network(generator.params, *a), z, text, mask)
    np.testing.assert_array_equal(samples.noise, z)
    np.testing.assert_allclose(samples.latents, latents, atol=1e-5)
    decoder = generator.latents.decoder
    expected = to_uint8(jax.jit(decoder.vae.decode)(decoder.params, latents))
    assert np.abs(samples.frames.astype(int) - expected).max() <= 1
    assert samples.frames.std() > 10


def test_on_a_mesh(generator, base):
    """The network over context, the VAE over the rows of all devices: the same latents, and the
    same pictures but for bytes on the edge of rounding."""
    spread = api.load(base, mesh={"context": 4, "fsdp": 2})
    spread.latents.text_encoder = Encoder()
    size = dict(seed=3, frames=3, height=16, width=24)
    there, here = (g.sample("cat", latents=True, **size) for g in (spread, generator))
    np.testing.assert_array_equal(there.noise, here.noise)
    assert np.abs(there.latents - here.latents).max() < 1e-5 * np.abs(here.latents).max()
    assert np.abs(there.frames.astype(int) - here.frames).max() <= 1


def test_the_command_line(generator, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LatentSpace, "text_encoder", Encoder())
    code = cli.main(["sample", "--checkpoint", str(base), "--prompt", "cat", "--frames", "1",
                     "--height", "16", "--width", "16", "--tiled", "--save-latents", "--out",
                     str(tmp_path)])
    out = capsys.readouterr()
    assert code == 0 and "wrote 1 image to" in out.out
    assert "sampling: decoding: 1/1 frames" in out.err
    assert json.loads((tmp_path / "sample.json").read_text())["width"] == 16
    saved = load_file(tmp_path / "latents.safetensors")
    assert {k: v.shape for k, v in saved.items()} == dict.fromkeys(
        ("noise", "latents"), (1, 1, 4, 4, 4))


@pytest.mark.parametrize("size, words", [
    (dict(frames=2, height=16, width=16), "takes 1 \\+ 2k frames, not 2; the nearest count is 1"),
    (dict(frames=1, height=20, width=16), "height = 20 is not a multiple of 8 .VAE 4, patch 2.; "
                                          "the nearest is 16"),
    (dict(frames=1, height=16, width=4), "width = 4 is not a multiple of 8"),
    (dict(frames=1), "the size of a sample is not known; give"),
])
def test_sizes_that_do_not_fit(generator, size, words):
    with pytest.raises(UserError, match=words):
        generator.sample("cat", **size)


def test_evaluation_counts_pixels_too(generator, base, monkeypatch, capsys, tmp_path):
    """The sizes of config.data are of latents; the real data that they are held to are pictures."""
    asked = []

    def load_split(path, split, *size, **_):
        asked.append(size)
        raise UserError("enough seen")

    config = base_config()
    config.data.frames, config.data.height, config.data.width = (1, 5), 4, 6
    monkeypatch.setattr(generator, "config", config)
    monkeypatch.setattr(api, "load", lambda path, weights, base: asked.append(base) or generator)
    monkeypatch.setattr("apt_jax.eval.evaluate.load_split", load_split)
    words = ["evaluate", "--checkpoint", "run", "--out", str(tmp_path)]
    assert cli.main([*words, "--base", str(base)]) == 2
    assert cli.main([*words, "--frames", "1", "--height", "32"]) == 2
    assert "enough seen" in capsys.readouterr().err
    assert asked == [str(base), (9, 16, 24), None, (1, 32, 24)]


def test_default_size_counts_latents(base):
    config = base_config().data
    config.frames, config.height, config.width = (1, 21), 60, 104
    assert LatentSpace(base, "float32").default_size(config) == (41, 240, 416)


def test_a_generator_without_its_base(base):
    """A weights folder does not say where its VAE is."""
    generator = api.load(base / "transformer")  # inside the component folder it is found
    assert generator.latents.base == base
    alone = api.Generator(generator.model, generator.params)
    with pytest.raises(UserError, match="makes latents of 4 channels; name the component folder"):
        alone.sample("cat")
    with pytest.raises(UserError, match="the generator 16; give the generator's own base"):
        generator.latents.shape({"in_channels": 16, "patch": (1, 2, 2)}, 1, 16, 16)


def test_progress_counts_frames(capsys):
    vae = make_vae(VAE)
    decoder = FrameDecoder(vae, random(vae.abstract()))
    frames = decode_latents(decoder, np.zeros((2, 2, 2, 2, 3), np.float32), "clips")
    assert frames.shape == (2, 3, 8, 8, 3)
    assert "clips: 6/6 frames" in capsys.readouterr().err
