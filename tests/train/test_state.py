"""The abstract state: the 8B recipe without its memory, and wrong starts named in one line."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiny import emoji_config, random_weights, tiny_config

from apt_jax.config import load_config
from apt_jax.errors import UserError
from apt_jax.parallel.mesh import make_mesh
from apt_jax.train.loop import check_data
from apt_jax.train.state import frozen_inputs, init_state, set_up

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_8b_recipe_is_set_up_without_allocating_it():
    config = load_config(CONFIGS / "seaweed_8b_image.py",
                         ["--config.mesh.replica=1", "--config.mesh.fsdp=8"])
    setup = set_up(config, make_mesh(config.mesh))
    leaves = jax.tree.leaves(setup.abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.abstract["generator"]))
    assert 7e9 < count < 9e9
    whole = sum(leaf.size for leaf in leaves)
    share = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert share < 1.01 * whole / 8  # all that is big is cut over the eight devices


def test_moments_average_and_parameters_lie_together():
    config = tiny_config("adversarial")
    state = set_up(config, make_mesh(config.mesh), min_elements=1).shardings
    for name in ("generator", "discriminator"):
        (moments,) = [part.nu for part in state[f"{name}_opt"] if hasattr(part, "nu")]
        assert moments == state[name]
    assert state["generator_ema"] == state["generator"]


def test_weights_of_another_model_are_named(tmp_path):
    weights = random_weights(tmp_path)
    config = emoji_config(init__generator=weights, model__mlp_ratio=4)
    with pytest.raises(UserError, match="set config.model as the weights were trained"):
        init_state(config, set_up(config, make_mesh(config.mesh)))


def test_consistency_needs_a_teacher():
    config = tiny_config("consistency")
    with pytest.raises(UserError, match="set init.diffusion"):
        frozen_inputs(config, None, None, None, None)


@pytest.mark.parametrize(("width", "shape", "says"), [
    (9, (1, 4, 4), "set model.text_width = 9"),
    (8, (1, 5, 4), "no multiple of model.patch"),
])
def test_data_that_does_not_fit_the_model_is_named(width, shape, says):
    shapes = [SimpleNamespace(frames=shape[0], height=shape[1], width=shape[2])]
    with pytest.raises(UserError, match=says):
        check_data(tiny_config(), SimpleNamespace(text_width=width, shapes=shapes, kind="pixels",
                                                   channels=3))


@pytest.mark.parametrize(("stage", "fields", "says"), [
    ("adversarial", {"generator": "runs/none", "diffusion": "runs/neither"},
     "init.generator = 'runs/none': there is no such folder; a run of the stage before makes it "
     "(apt-jax train --workdir runs/none), or give another path with --config.init.generator=PATH"),
    ("consistency", {"diffusion": "runs/none"},
     "init.diffusion = 'runs/none': there is no such folder; a run of pre-training makes it"),
    ("adversarial", {"generator": ".", "diffusion": ""}, "init.generator: . holds neither"),
])
def test_a_start_that_is_not_there_is_named_with_its_field(stage, fields, says, tmp_path,
                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = emoji_config(stage, **{f"init__{name}": path for name, path in fields.items()})
    with pytest.raises(UserError) as error:
        init_state(config, set_up(config, make_mesh(config.mesh)))
    assert str(error.value).startswith(says)
