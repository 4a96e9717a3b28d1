"""configs/emoji_64.py from its first stage to its last: a few steps of a narrow network on CPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from apt_jax.cli import main as cli

CONFIG = Path(__file__).parents[1] / "configs" / "emoji_64.py"
STAGES = ("pretrain", "consistency", "image", "video")
# Only what makes it quick on two cores: the network's size, the batches and the number of steps.
SMALL = [
    "--config.model.patch=1,8,8", "--config.model.width=32", "--config.model.heads=2",
    "--config.model.head_dim=16", "--config.model.rope_axes=4,6,6", "--config.model.depth=2", "--config.train.batch_size=8",
    "--config.train.clip_batch_size=8", "--config.train.steps=2", "--config.train.log_every=1",
    "--config.optimizer.warmup_steps=1", "--config.train.sample_every=0",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The four runs, one after the other, each starting from those before it."""
    folder = tmp_path_factory.mktemp("emoji_64")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in STAGES:
            code = cli.main(["train", "--config", f"{CONFIG}:{stage}", "--quiet",
                             "--workdir", f"runs/emoji_64/{stage}", *SMALL])
            assert code == 0, stage
    return folder / "runs" / "emoji_64"


def test_every_stage_runs_on_what_the_stage_before_left(runs):
    for stage in STAGES:
        lines = [json.loads(line) for line in (runs / stage / "metrics.jsonl").read_text().split(
            "\n") if line]
        losses = [value for line in lines for name, value in line.items() if "loss" in name]
        assert losses and np.isfinite(losses).all(), stage


def test_the_last_generator_draws_a_clip_of_8_frames(runs):
    import apt_jax

    clip = apt_jax.load(runs / "video").sample("red heart")
    assert clip.frames.shape == (1, 8, 64, 64, 3) and clip.frames.std() > 0


def test_no_file_of_the_state_is_over_16_mb(runs):
    sizes = [path.stat().st_size for path in runs.rglob("*") if path.is_file()]
    assert sizes and max(sizes) <= 16e6
