"""A run reads a prepared data set of latents like any other."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from apt_jax.data import prepare
from apt_jax.errors import UserError
from apt_jax.train.loop import train

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import tiny_media  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight clips as latents [2, 4, 4, 16] with text states 12 wide."""
    root = tmp_path_factory.mktemp("latents")
    (root / "in").mkdir()
    for i in range(8):
        tiny_media.save_video(root / "in" / f"film{i}.mp4", 6 + i, height=32, width=32)
    tiny_media.write_table(root / "in", [(f"film{i}.mp4", f"film {i}") for i in range(8)])
    settings = prepare.Settings(sizes=((32, 32),), frames=(5,), fps=10.0, holdout=0.0,
                                max_tokens=4, text_dtype="bfloat16")
    prepare.prepare(root / "in", root / "out", settings, encoder=tiny_media.HashEncoder(),
                    codec=tiny_media.PoolCodec(), progress=False)
    return root / "out"


def config(data, **overrides):
    fixed = {"data__path": str(data), "data__frames": (2,), "data__height": 0, "data__width": 0,
             "model__in_channels": 16, "model__out_channels": 16, "model__text_width": 12,
             "train__checkpoint_every": 2, "data__threads": 0}
    return tiny_config(**{**fixed, **overrides})


def test_a_run_on_latents(data, tmp_path):
    """That batches of latents continue bit by bit is tested with the pipeline."""
    done = train(config(data, train__steps=2), tmp_path / "run", quiet=True)
    assert done["step"] == 2 and np.isfinite(done["metrics"]["loss"])


def test_a_model_of_pixels_is_told_what_to_set(data, tmp_path):
    with pytest.raises(UserError, match="train.sample_every = 0"):
        train(config(data, train__sample_every=2), tmp_path / "run")
    with pytest.raises(UserError, match="model.in_channels and model.out_channels = 16"):
        train(config(data, model__in_channels=3, model__out_channels=3), tmp_path / "run")
