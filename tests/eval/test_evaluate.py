"""Evaluation on the bundled pictures: damage raises FD, a sweep keeps its best, the files agree."""

import json

import jax
import numpy as np
import pytest
from PIL import Image, ImageFilter

from apt_jax.api import Generator
from apt_jax.cli.main import main
from apt_jax.config import base_config
from apt_jax.errors import UserError
from apt_jax.eval.evaluate import Split, evaluate_generator, evaluate_samples, load_split
from apt_jax.eval.measure import Reference, floor, measure
from apt_jax.eval.samples import SampleSet, load_samples, save_samples
from apt_jax.eval.table import format_result
from apt_jax.models.presets import make_generator
from apt_jax.weights import save_generator

pytestmark = pytest.mark.slow
DIM = 32
HOLDOUT = ("bundled:emoji", "holdout", 1, 16, 16, 8)


@pytest.fixture(scope="module")
def real():
    return load_split(*HOLDOUT)


@pytest.fixture(scope="module")
def generator():
    config = base_config()
    config.model.update({"patch": (1, 4, 4), "width": 32, "depth": 1, "heads": 1, "head_dim": 32,
                         "rope_axes": (8, 12, 12), "text_width": 384})
    config.data.max_text_tokens = 8
    params = make_generator(config.model).init(jax.random.key(0))
    # An untrained network puts out zeros, whatever the guidance: give every weight a value.
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.2 * noise.normal(size=w.shape).astype(np.float32), params)
    return Generator(config.model, params, config, source="test")


def test_bundled_pictures_rank_damage(real):
    whole = real.frames[::2]
    reference = Reference.build(whole, DIM, label="")
    blurred = [np.stack([np.asarray(Image.fromarray(x[0]).filter(ImageFilter.GaussianBlur(r)))[None]
                         for x in whole]) for r in (0.5, 1, 2)]
    noise = np.random.default_rng(0).normal(size=whole.shape)
    noisy = [np.clip(whole + s * noise, 0, 255).astype(np.uint8) for s in (5, 15, 40)]
    for series in (blurred, noisy):
        distances = [measure(frames, reference)["fd"] for frames in series]
        assert 0 < distances[0] < distances[1] < distances[2]
        assert distances[2] > 2 * floor(reference)["fd"]
    # a tenth of the pictures, repeated: each is perfect, the set is not
    few = whole[np.arange(len(whole)) % (len(whole) // 10)]
    assert measure(few, reference)["fd"] > floor(reference)["fd"]


def test_a_sweep_reports_its_best_value(generator, real):
    real = first(real, 4 * DIM)
    result, samples = evaluate_generator(generator, real, real, mode="euler", steps=2,
                                         guidance=(0.0, 3.0), dim=DIM, seed=1)
    distances = [entry["fd"] for entry in result["sweep"]]
    assert result["train"]["fd"] == min(distances) and len(set(distances)) == 2
    assert result["settings"]["guidance"] == result["train"]["guidance"]
    assert result["train"]["n"] == len(real.captions) == len(samples.captions)
    assert result["held_out"]["kid_low"] < result["held_out"]["kid_high"]
    assert result["held_out"]["kid"] > 0 and result["train"]["fd"] > result["floor"]["fd"]
    json.dumps(result)


def test_guidance_needs_euler(generator, real):
    with pytest.raises(UserError, match="euler"):
        evaluate_generator(generator, real, None, mode="one_step", guidance=(1.0,), dim=DIM)


def test_the_command_measures_a_checkpoint_and_its_samples_alike(generator, real, tmp_path, capsys):
    weights, out = tmp_path / "weights", tmp_path / "out"
    save_generator(weights, generator.model, generator.params)
    shape = ["--split", "holdout", "--dim", str(DIM)]
    assert main(["evaluate", "--checkpoint", str(weights), "--height", "16", "--width", "16",
                 "--frames", "1", "--count", "80", "--held-out", "", "--out", str(out),
                 *shape]) == 0
    first = json.loads((out / "evaluation.json").read_text())
    assert first["train"]["n"] == 80 and "held_out" not in first
    samples = load_samples(out / "samples.npz")
    assert samples.captions == real.captions[:80] and samples.frames.shape == (80, 1, 16, 16, 3)
    assert "real against real" in capsys.readouterr().out
    assert main(["evaluate", "--samples", str(out / "samples.npz"), "--out",
                 str(tmp_path / "again"), *shape]) == 0
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert again["train"]["fd"] == pytest.approx(first["train"]["fd"], rel=1e-4)


@pytest.mark.parametrize("flags, says", [
    (["--batch", "-1"], "batch = -1 must be at least 1"), (["--batch", "0"], "batch = 0"),
    (["--count", "-3"], "count = -3 must be at least 0"), (["--dim", "0"], "dim = 0"),
    (["--dim", "1281"], "at most 1280")])
def test_wrong_numbers_end_before_anything_is_read(tmp_path, capsys, flags, says):
    assert main(["evaluate", "--checkpoint", str(tmp_path / "none"), "--out",
                 str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, says", [
    (["--frames", "0"], "--frames 0 must be at least 1"), (["--height", "17"], "height = 17 is not"),
    (["--steps", "5"], "steps = 5 belongs to mode 'euler'"),
    (["--mode", "euler", "--steps", "0"], "steps = 0 must be"),
    (["--count", "100"], "100 sample frames are too few")])
def test_wrong_settings_end_before_anything_is_measured(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.setattr("apt_jax.eval.evaluate.MobileNetFeatures",
                        lambda: pytest.fail("the work began"))
    assert main(["evaluate", "--checkpoint", "bundled:base", "--frames", "1", "--held-out", "",
                 "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1] and "Traceback" not in error


def test_a_folder_that_cannot_be_is_named_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("apt_jax.api.load", lambda *a: pytest.fail("the work began"))
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        assert main(["evaluate", "--checkpoint", "bundled:base", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"{out} cannot be written" in error and error.count("\n") == 1


def test_seeds_and_guidance_are_checked_before_the_reference(generator, real, monkeypatch):
    monkeypatch.setattr(Reference, "build", lambda *a, **k: pytest.fail("the reference was built"))
    wrong = {"seed": 2**31, "batch": 0, "count": -1, "guidance": (1.0, float("nan"))}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"{name} = "):
            evaluate_generator(generator, real, None, mode="euler", **{name: value})


def test_too_few_samples_end_in_one_line(tmp_path, capsys):
    save_samples(tmp_path / "few.npz", np.zeros((10, 1, 16, 16, 3), np.uint8), ["x"] * 10)
    assert main(["evaluate", "--samples", str(tmp_path / "few.npz"), "--split", "holdout",
                 "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("apt-jax: 10 sample frames are too few") and "256" in error


def first(split, count):
    """The first records of a split."""
    return Split(*(part[:count] for part in split[:4]), split.null)


def test_a_small_split_and_one_held_out_record_leave_their_parts_out(generator, real, caplog):
    """100 records: enough for 32 dimensions, half of them is not."""
    few = first(real, 100)
    kept = []
    with caplog.at_level("WARNING"):
        result, samples = evaluate_generator(
            generator, few, first(real, 1), mode="euler", steps=1, guidance=(1.0, 2.0), dim=DIM,
            keep=lambda found, samples: kept.append((json.loads(json.dumps(found)), samples)))
    assert result["floor"] is None and result["held_out"] is None and result["train"]["fd"] > 0
    floor_line, kid_line = result["left_out"]
    assert "half of the data, 50 records" in floor_line and "--dim of at most 25" in floor_line
    assert "split has 1" in kid_line and "--held-out" in kid_line
    assert [record.getMessage() for record in caplog.records] == [floor_line, kid_line]
    shown = format_result(result, "euler")
    assert floor_line in shown and "real against real " not in shown and shown.count("(best)") == 1
    # After each value the best so far is handed out: a stop loses one value only.
    assert [len(found["sweep"]) for found, _ in kept] == [1, 2]
    assert kept[0][0]["left_out"][-1] == "Not finished: guidance 2 was not tried."
    assert kept[-1][0]["train"] == result["train"] and kept[-1][1] is samples
    found = evaluate_samples(SampleSet(few.frames, few.captions), few, DIM)
    assert found["floor"] is None and found["left_out"] == [floor_line]


@pytest.mark.parametrize("count, dim, says", [
    (0, 60, "100 frames of the data are too few .* take at least 120 records, or lower --dim to at "
            "most 50"),
    (70, 50, "70 sample frames are too few .* raise --count to 100, or lower --dim to at most 35")])
def test_too_few_for_the_fd_is_said_before_anything_is_drawn(generator, real, monkeypatch, count,
                                                              dim, says):
    monkeypatch.setattr(Generator, "draw", lambda *a, **k: pytest.fail("something was drawn"))
    monkeypatch.setattr(Reference, "build", lambda *a, **k: pytest.fail("the reference was built"))
    with pytest.raises(UserError, match=says):
        evaluate_generator(generator, first(real, 100), None, mode="one_step", count=count, dim=dim)


def test_a_sweep_that_is_interrupted_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    def interrupted(generator, train, held_out, *, keep, left_out, **settings):
        entry = {"fd": 5.0, "n": 1, "dim": 2, "guidance": 1.0}
        keep({"settings": {"mode": "euler"}, "floor": None, "train": entry, "sweep": [entry]},
             SampleSet(np.zeros((1, 1, 4, 4, 3), np.uint8), ["a"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("apt_jax.eval.evaluate.evaluate_generator", interrupted)
    assert main(["evaluate", "--checkpoint", "bundled:base", "--mode", "euler", "--frames", "1",
                 "--held-out", "", "--guidance", "1", "--guidance", "2", "--out",
                 str(tmp_path)]) == 130
    file = tmp_path / "evaluation.json"
    assert f"what was measured so far is in {file}" in capsys.readouterr().err
    assert json.loads(file.read_text())["train"]["fd"] == 5.0
    assert load_samples(tmp_path / "samples.npz").captions == ["a"]


def test_clips_are_compared_at_the_speed_that_the_run_trained_at():
    eight, thinned = (load_split("bundled:emoji", "holdout", frames, 16, 16, frame_stride=stride)
                      for frames, stride in ((8, 1), (2, 4)))
    assert thinned.captions == eight.captions
    np.testing.assert_array_equal(thinned.frames, eight.frames[:, ::4])


def test_data_without_the_default_split_leave_kid_out(monkeypatch):
    from apt_jax.eval import evaluate

    def load(path, split, *shape):
        raise UserError(f"data.split {split!r} is not in {path}; it has: train")

    monkeypatch.setattr(evaluate, "load_split", load)
    assert evaluate.load_held_out("some", "", 1, 16, 16) == (None, [])
    split, (line,) = evaluate.load_held_out("some", "holdout", 1, 16, 16)
    assert split is None and line.startswith("KID is left out") and "--held-out, or ''" in line
    with pytest.raises(UserError, match="'test' is not in some"):
        evaluate.load_held_out("some", "test", 1, 16, 16)


@pytest.mark.parametrize("flags", [
    ["--guidance", "7"], ["--mode", "one_step"], ["--count", "10"], ["--steps", "3"],
    ["--weights", "raw"], ["--frames", "9"], ["--height", "8"], ["--width", "8"], ["--seed", "0"],
    ["--batch", "1"], ["--time", "0.5"], ["--fresh-noise"], ["--held-out", "holdout"]])
def test_flags_that_say_nothing_about_a_file_are_refused(tmp_path, capsys, flags):
    assert main(["evaluate", "--samples", "none.npz", "--out", str(tmp_path / "x"), *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{flags[0]} says how samples are drawn" in said and not (tmp_path / "x").exists()
