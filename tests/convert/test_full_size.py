"""The tables against every name and shape of the public checkpoints; counts of parameters."""

import math
import sys
from pathlib import Path

import pytest

from apt_jax.convert.families import transformer_plan, umt5_plan, vae_plan
from apt_jax.convert.tables import qwen_image, umt5, vae, wan

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import full_size  # noqa: E402

MODELS = {
    "wan_1_3b": (wan.model_from, transformer_plan, 1_418_996_800),
    "wan_14b": (wan.model_from, transformer_plan, 14_288_491_584),
    "qwen_image": (qwen_image.model_from, transformer_plan, 20_430_401_088),
    "wan_vae": (vae.config_from_theirs, vae_plan, 126_892_531),
    "qwen_image_vae": (vae.config_from_theirs, vae_plan, 126_892_531),
    "umt5_xxl": (umt5.config_from_theirs, umt5_plan, 5_680_910_336),
}


@pytest.fixture(scope="module")
def committed():
    return full_size.read()


@pytest.mark.parametrize("name", MODELS)
def test_every_name_and_shape(committed, name):
    read, plan_of, count = MODELS[name]
    model = committed[name]
    plan = plan_of(read(model["config"], name))
    plan.check(model["tensors"], name)
    assert sum(math.prod(leaf.shape) for leaf in plan.leaves.values()) == count
    tied = sum(math.prod(model["tensors"][a]) for a in plan.aliases if a in model["tensors"])
    assert sum(map(math.prod, model["tensors"].values())) - tied == count


def test_the_committed_names_are_the_installed_ones(committed):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    live = full_size.live()
    assert set(live) == set(committed)
    for name, model in live.items():
        assert committed[name]["tensors"] == {k: tuple(v) for k, v in model["tensors"].items()}
        known = committed[name]["config"]
        # Another release may have more fields, but none of another value.
        assert {k: v for k, v in model["config"].items() if k in known} == known
