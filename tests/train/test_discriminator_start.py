"""init.discriminator: the next stage's D goes on where that of the last one ended."""

import jax
import numpy as np
import pytest
from tiny import emoji_config, random_weights

from apt_jax.config import validate
from apt_jax.errors import UserError
from apt_jax.parallel.mesh import make_mesh
from apt_jax.train.checkpoint import Checkpoints, write_run_files
from apt_jax.train.loop import train
from apt_jax.train.state import init_state, set_up

pytestmark = pytest.mark.slow


def start(config):
    return init_state(config, set_up(config, make_mesh(config.mesh)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """(folder of an adversarial run of two updates, its config, its last state)."""
    folder = tmp_path_factory.mktemp("images")
    weights = random_weights(folder / "weights")
    config = emoji_config("adversarial", train__steps=2, init__diffusion=weights,
                          init__generator=weights)
    train(config, folder / "run", quiet=True)
    checkpoints = Checkpoints(folder / "run", config)
    state = checkpoints.restore(set_up(config, make_mesh(config.mesh)).abstract).state
    checkpoints.close()
    return folder / "run", config, state


def test_d_is_the_last_stages_whole_and_its_moments_are_new(images):
    run, config, last = images
    clips = emoji_config("adversarial", init__diffusion=config.init.diffusion,
                         init__generator=str(run), init__discriminator=str(run), data__frames=(2,))
    state = start(validate(clips))
    jax.tree.map(np.testing.assert_array_equal, state["discriminator"], last["discriminator"])
    jax.tree.map(np.testing.assert_array_equal, state["generator"], last["generator_ema"])
    moments = [x for x in jax.tree.leaves(state["discriminator_opt"]) if x.ndim]
    assert moments and not any(np.any(x) for x in moments)
    where = jax.tree.map(lambda x: x.sharding, state["discriminator"])
    assert where == set_up(clips, make_mesh(clips.mesh)).shardings["discriminator"]
    # and by default it is not: the paper's D starts from the diffusion weights, with new heads
    clips.init.discriminator = ""
    plain = start(clips)["discriminator"]
    assert any(np.any(a != b) for a, b in zip(
        jax.tree.leaves(plain), jax.tree.leaves(last["discriminator"]), strict=True))


def test_it_trains_on(images, tmp_path):
    run, config, _ = images
    clips = emoji_config("adversarial", train__steps=1, init__diffusion=config.init.diffusion,
                         init__generator=str(run), init__discriminator=str(run), data__frames=(2,))
    assert train(clips, tmp_path / "clips", quiet=True)["status"] == "complete"
    other = clips.copy_and_resolve_references()
    other.init.discriminator = ""
    with pytest.raises(UserError, match="init.discriminator = "):
        train(other, tmp_path / "clips", quiet=True)  # a finished run of another start


def test_what_is_no_discriminator_is_named(images, tmp_path):
    run, config, _ = images

    def asked(path, **overrides):
        return start(emoji_config("adversarial", init__diffusion=config.init.diffusion,
                                  init__generator=str(run), init__discriminator=str(path),
                                  **overrides))

    with pytest.raises(UserError, match="is no run folder"):
        asked(tmp_path)
    (tmp_path / "pretrain" / "checkpoints").mkdir(parents=True)
    write_run_files(tmp_path / "pretrain", emoji_config())
    with pytest.raises(UserError, match="of stage 'pretrain' and has no discriminator"):
        asked(tmp_path / "pretrain")
    with pytest.raises(UserError, match=rf"{run}: its parameter 'heads/.*' is .*, here .*; set"):
        asked(run, discriminator__taps=(1, 2))
    adapted = tmp_path / "adapted"
    (adapted / "checkpoints").mkdir(parents=True)
    write_run_files(adapted, emoji_config("adversarial", lora__rank=2, lora__discriminator=True))
    with pytest.raises(UserError, match="adapted trained adapters of its discriminator; give one"):
        asked(adapted)


@pytest.mark.parametrize(("stage", "fields", "says"), [
    ("consistency", {}, "stage consistency has no discriminator"),
    ("adversarial", {"init__discriminator": "bundled:base"}, "no discriminator is bundled"),
    ("adversarial", {"lora__rank": 2, "lora__discriminator": True}, "unset one of them"),
])
def test_configs_that_cannot_be_are_refused(stage, fields, says):
    config = emoji_config(stage, **{"init__diffusion": "bundled:base", "init__generator": "runs/a",
                                    "init__discriminator": "runs/a", **fields})
    with pytest.raises(UserError, match=says):
        validate(config)
