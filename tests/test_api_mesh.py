"""Sampling on eight devices gives what one gives."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import apt_jax
from apt_jax.cli import main as cli
from apt_jax.eval.generate import sample_noise
from apt_jax.parallel.context import ContextParallel

PROMPTS = ["red heart", "cat face", "red apple"]  # three: no batch axis divides them


@pytest.fixture(scope="module")
def one():
    return apt_jax.load("bundled:base")


def draw(generator, text, mask):
    """One step of the generator in float32, [N, F, H, W, C]."""
    z = sample_noise(0, np.arange(len(text)), (1, 16, 16, 3))

    @jax.jit
    def run(params, z, text, mask):
        return z - generator.network(params, z, np.ones(len(text), np.float32), text, mask)

    return np.asarray(run(generator.params, z, text, mask))


@pytest.mark.parametrize("mesh", [{"context": 8}, {"fsdp": 4, "context": 2}])
def test_samples_are_those_of_one_device(mesh, one):
    eight = apt_jax.load("bundled:base", mesh=mesh)
    leaf = eight.params["backbone"]["blocks"]["video"]["mlp"]["up"]["kernel"]
    assert leaf.addressable_shards[0].data.size < leaf.size
    text, mask = one.encode(PROMPTS)
    found, want = draw(eight, text, mask), draw(one, text, mask)
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()


def test_the_command_takes_the_mesh_flags_of_train(tmp_path, capsys):
    command = ["sample", "--checkpoint", "bundled:base", "--prompt", "red heart", "--count", "2",
               "--frames", "1", "--save-latents"]
    assert cli.main([*command, "--out", str(tmp_path / "one")]) == 0
    assert cli.main([*command, "--out", str(tmp_path / "eight"), "--config.mesh.context=4"]) == 0
    names = [path.name for path in sorted((tmp_path / "one").glob("0*.png"))]
    assert len(names) == 2
    for name in names:
        a, b = (np.asarray(Image.open(tmp_path / d / name), np.int32) for d in ("one", "eight"))
        assert np.abs(a - b).max() <= 1  # a value on the edge of rounding may fall to either side
    want, found = (load_file(tmp_path / d / "latents.safetensors") for d in ("one", "eight"))
    np.testing.assert_array_equal(found["noise"], want["noise"])
    difference = np.abs(found["latents"] - want["latents"]).max()
    assert difference < 1e-5 * np.abs(want["latents"]).max()
    assert json.loads((tmp_path / "eight" / "sample.json").read_text())["seed"] == 0
    assert cli.main([*command, "--config.mesh.tensor=3"]) == 2
    assert "the nearest size that works" in capsys.readouterr().err
    assert cli.main([*command, "--config.train.steps=3"]) == 2
    assert "but those of mesh" in capsys.readouterr().err


def test_a_bfloat16_network_casts_its_matrices_before_they_travel(monkeypatch):
    seen = []
    layer = ContextParallel.layer
    monkeypatch.setattr(ContextParallel, "layer", lambda self, tree: (
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.ndim == 2),
        layer(self, tree))[1])
    eight = apt_jax.load("bundled:base", mesh={"fsdp": 8})
    model = {**dict(eight.model), "dtype": "bfloat16"}
    generator = apt_jax.Generator(model, eight.params, eight.config, scope=eight.network.scope)
    text, mask = generator.encode(PROMPTS)
    pixels = generator.draw(text, mask, PROMPTS, null=(text[0], mask[0]), frames=1).frames
    assert set(seen) == {np.dtype("bfloat16")} and pixels.std() > 10
