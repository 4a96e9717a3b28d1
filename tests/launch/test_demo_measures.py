"""What the demo measures: the baseline at its better weights, every sweep at its best."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apt_jax import api
from apt_jax.config import base_config
from apt_jax.eval import evaluate, measure
from apt_jax.eval.samples import SampleSet, load_samples

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "demo.py"
FRAMES = np.zeros((2, 1, 4, 4, 3), np.uint8)


@pytest.fixture
def demo(monkeypatch):
    """launch/demo.py whose generators draw pictures of one value: their FD."""
    spec = importlib.util.spec_from_file_location("demo_measures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fds = {("base", "ema"): 90, ("consistency", "ema"): 200, ("consistency", "raw"): 180,
           ("image", "ema"): 100, ("image", "raw"): 110}

    def draw(generator, split, count, label, *, mode, time=None, guidance=None, **settings):
        fd = fds[generator] + (0 if time is None else round(50 * (1 - time)))
        used = {"sampling_seconds": 1.0, "weights": generator[1], "mode": mode}
        used |= {k: v for k, v in (("time", time), ("guidance", guidance)) if v is not None}
        return SampleSet(np.full_like(FRAMES, fd), ["a", "b"]), used

    monkeypatch.setattr(api, "load", lambda path, weights="ema": (Path(path).name, weights))
    monkeypatch.setattr(evaluate, "load_split", lambda *a: SimpleNamespace(
        frames=FRAMES, captions=["a", "b"]))
    monkeypatch.setattr(evaluate, "draw", draw)
    monkeypatch.setattr(measure.Reference, "build", lambda *a, **k: SimpleNamespace(hash="0" * 24))
    monkeypatch.setattr(measure, "measure", lambda frames, *a: {"fd": float(frames.flat[0])})
    monkeypatch.setattr(measure, "floor", lambda reference: {"fd": 20.0})
    monkeypatch.setattr(module, "best_guidance", lambda base, kind: [3.0])
    return module


def measured(demo, folder, limit=None):
    """The image entries, where there is time: None where not."""
    found = demo.measure_kind(
        "image", base_config(), folder, "base", 0, batch=32,
        measured=demo.Measured(folder, {}), limit=limit or demo.Limit(0))
    return found and found[0]


def test_the_baseline_is_the_better_of_raw_and_averaged_weights(demo, tmp_path):
    entries = measured(demo, tmp_path)
    found = entries["consistency_1"]
    assert (found["fd"], found["weights"], found["other_fd"]) == (180, "raw", 200)
    assert load_samples(tmp_path / "samples/image/consistency_1.npz").frames.max() == 180
    assert entries["apt_1"]["fd"] == 100 and entries["apt_1"]["weights"] == "ema"
    assert entries["apt_1_raw"]["fd"] == 110 and "other_fd" not in entries["apt_1"]


def test_two_steps_are_tried_close_to_one(demo, tmp_path):
    entries = measured(demo, tmp_path)
    found = entries["apt_2"]
    times = [trial["time"] for trial in found["sweep"]]
    assert {0.75, 0.9, 0.95} <= set(times) and found["time"] == max(times)
    assert found["fd"] == min(trial["fd"] for trial in found["sweep"])


class Looks:
    """A limit that is over at the n-th look."""

    def __init__(self, n):
        self.left = n

    def over(self):
        self.left -= 1
        return self.left <= 0


def test_the_limit_is_looked_at_between_the_values_of_a_sweep(demo, tmp_path, monkeypatch):
    drawn, draw = [], evaluate.draw
    monkeypatch.setattr(evaluate, "draw", lambda *a, **k: drawn.append(a[3]) or draw(*a, **k))
    # One look before the data are read, one before each of 5 settings, then two times of three.
    assert measured(demo, tmp_path, Looks(1 + 5 + 2 + 1)) is None
    assert drawn.count("image apt_2") == 2 and not (tmp_path / "summary.json").exists()
    entries = measured(demo, tmp_path)
    assert drawn.count("image apt_2") == 3 and len(drawn) == 8  # nothing was drawn again
    found = entries["apt_2"]
    assert [trial["time"] for trial in found["sweep"]] == list(demo.TWO_STEP_TIMES)
    assert found["fd"] == min(trial["fd"] for trial in found["sweep"])
    assert load_samples(tmp_path / "samples/image/apt_2.npz").frames.max() == found["fd"]
    assert measured(demo, tmp_path / "fresh") == entries
