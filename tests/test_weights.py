"""Weights on disk: the round trip, and a line that names what is wrong for every broken folder."""

import json

import jax
import numpy as np
import pytest

from apt_jax.config import base_config
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.weights import flatten, load_generator, save_generator, unflatten


def model():
    m = base_config().model
    m.width, m.heads, m.head_dim, m.rope_axes, m.depth = 8, 1, 8, (2, 2, 4), 1
    m.text_width, m.mlp_ratio = 4, 2
    return m


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32),
                        make_generator(model()).abstract())


@pytest.fixture
def folder(params, tmp_path):
    return save_generator(tmp_path / "weights", model(), params, {"licence": "MIT"})


def test_flatten_and_back():
    tree = {"b": {"c": 1, "a": {"x": 2}}, "a": 3}
    assert flatten(tree) == {"a": 3, "b/a/x": 2, "b/c": 1}
    assert unflatten(flatten(tree)) == tree


def test_round_trip_is_exact(folder, params):
    found, loaded = load_generator(folder)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert found.patch == (1, 2, 2) and found.width == 8
    assert json.loads((folder / "config.json").read_text())["licence"] == "MIT"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_bfloat16_halves_the_file_and_loads_as_float32(folder, params, tmp_path):
    small = save_generator(tmp_path / "small", model(), params, bfloat16=True)
    size = lambda f: (f / "model.safetensors").stat().st_size  # noqa: E731
    assert size(small) < 0.7 * size(folder)
    _, loaded = load_generator(small)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2**-8)


def edited(params, change):
    flat = flatten(params)
    change(flat)
    return unflatten(flat)


@pytest.mark.parametrize(("change", "says"), [
    (lambda f: f.pop("proj_out/bias"), "lacks parameter 'proj_out/bias'"),
    (lambda f: [f.pop("proj_out/bias"), f.pop("proj_out/kernel")], "'proj_out/bias' and 1 more"),
    (lambda f: f.update({"extra": np.zeros(2, np.float32)}), "unknown parameter 'extra'"),
    (lambda f: f.update({"proj_out/bias": np.zeros(3, np.float32)}),
     r"'proj_out/bias' is \(3,\), its config.json says \(12,\)"),
])
def test_wrong_keys_and_shapes_are_named(params, tmp_path, change, says):
    save_generator(tmp_path, model(), edited(params, change))
    with pytest.raises(UserError, match=says):
        load_generator(tmp_path)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(("damage", "says"), [
    (cut, "damaged or incomplete"),
    (lambda f: (f / "model.safetensors").unlink(), "holds neither"),
    (lambda f: (f / "config.json").unlink(), "no readable config.json"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "config.json").write_text('{"kind": "vae"}'), "does not describe a generator"),
    (lambda f: (f / "model.safetensors").unlink() or (f / "checkpoints").mkdir()
     or base_config_to(f), "no readable checkpoint"),
])
def test_broken_folders_end_in_one_line(folder, damage, says):
    damage(folder)
    with pytest.raises(UserError, match=says) as error:
        load_generator(folder)
    assert "\n" not in str(error.value)


def base_config_to(folder):
    from apt_jax.config import save_json

    save_json(base_config(), folder / "config.json")


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_generator(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no bundled weights bundled:cats"):
        load_generator("bundled:cats")
    with pytest.raises(UserError, match="use 'ema' or 'raw'"):
        load_generator(tmp_path, "best")
