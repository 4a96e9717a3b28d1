"""configs/emoji_64.py from its first stage to its table: a few steps of a narrow network on CPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from apt_jax.eval import evaluate

pytestmark = pytest.mark.slow
LAUNCH = Path(__file__).parents[1] / "launch"
STAGES = ("pretrain", "consistency", "image", "video")
# Only what makes it quick on two cores: the network's size, the batches and the number of steps.
SMALL = [
    "--config.model.patch=1,16,16", "--config.model.width=32", "--config.model.heads=2",
    "--config.model.head_dim=16", "--config.model.rope_axes=4,6,6", "--config.model.depth=1",
    "--config.train.batch_size=8", "--config.train.clip_batch_size=8", "--config.train.steps=2",
    "--config.train.log_every=1", "--config.optimizer.warmup_steps=1",
    "--config.train.sample_every=0", "--config.sample.steps=2",
]


class Features:
    """In place of MobileNetV2, whose features of 6,000 frames take minutes on a CPU."""

    def __init__(self):
        self.weights = np.random.default_rng(0).normal(size=(8 * 8 * 3, 1280)).astype(np.float32)

    def __call__(self, frames, label=""):
        small = frames.reshape(len(frames), 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(frames), -1)
        return np.tanh((small.astype(np.float32) / 255 - 0.5) @ self.weights / 4)


def few(path, split, frames, *rest, real=evaluate.load_split):
    whole, rows = real(path, split, frames, *rest), slice(520 if frames == 1 else 80)
    return whole._replace(**{name: getattr(whole, name)[rows]
                             for name in ("frames", "captions", "text", "mask")})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What `launch/demo.py --family emoji_64` leaves, in two calls: the first one's time is up
    while it measures."""
    folder = tmp_path_factory.mktemp("emoji_64")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(LAUNCH))
        import demo

        patch.setattr("apt_jax.eval.mobilenet.MobileNetFeatures", Features)
        # As few as an FD takes: of the samples, and in each half of the data.
        patch.setattr(demo, "COUNT", {"image": 256, "video": 40})
        patch.setattr(evaluate, "load_split", few)
        command = ["--family", "emoji_64", *SMALL]
        # before each of the four stages, the images' data, three weights of guidance, and the
        # first of the two models that the distillation leaves
        looks = []
        with patch.context() as first:
            first.setattr(demo.Limit, "over", lambda _: looks.append(1) or len(looks) > 9)
            assert demo.main(command) == 1
        kept = json.loads((folder / "runs/emoji_64/measured.json").read_text())["entries"]
        assert set(kept) == {"image/diffusion_25", "image/diffusion_25, tried",
                             "image/consistency_1, tried"}
        assert len(kept["image/consistency_1, tried"]) == 1
        assert demo.main(command) == 0
        summary = json.loads((folder / "runs/emoji_64/summary.json").read_text())
        assert summary["image"]["diffusion_25"] == kept["image/diffusion_25"]
        assert kept["image/consistency_1, tried"][0]["fd"] in [
            summary["image"]["consistency_1"][name] for name in ("fd", "other_fd")]
        patch.setattr(demo, "train_all", None)  # a third call only prints
        assert demo.main(command) == 0
    return folder / "runs" / "emoji_64"


def test_the_table_the_samples_and_the_report_are_made(runs):
    from apt_jax.eval.samples import load_samples

    summary = json.loads((runs / "summary.json").read_text())
    assert summary["length"] == "emoji_64" and summary["base"] == "pretrain"
    names = {"diffusion_25", "consistency_1", "apt_1", "apt_1_raw", "apt_2"}
    for kind, count, frames in (("image", 256, 1), ("video", 40, 8)):
        assert set(summary[kind]) == {"floor", *names}
        assert all(np.isfinite(entry["fd"]) for entry in summary[kind].values())
        assert len(summary[kind]["diffusion_25"]["sweep"]) == 3  # no card names the best guidance
        facts = summary["data"][kind]
        assert (facts["frames"], facts["height"], facts["width"]) == (frames, 64, 64)
        for name in names:
            samples = load_samples(runs / "samples" / kind / f"{name}.npz")
            assert samples.frames.shape == (count, frames, 64, 64, 3)
    assert (runs / "report.html").stat().st_size > 1e5 and (runs / "video.webp").is_file()
    assert not (runs / "measured.json").exists()


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
    sizes = [path.stat().st_size for stage in STAGES for path in (runs / stage).rglob("*")
             if path.is_file()]
    assert sizes and max(sizes) <= 16e6
