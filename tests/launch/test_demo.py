"""launch/demo.py and launch/ablations.py without their training: what they refuse and continue."""

import json
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    import demo

    return demo


def begun(folder, config, step):
    """What check_runs reads of a run: the newest checkpoint's config."""
    import orbax.checkpoint as ocp

    from apt_jax.config import config_to_json

    meta = folder / "checkpoints" / str(step) / "meta"
    meta.mkdir(parents=True)
    ocp.JsonCheckpointHandler().save(meta, args=ocp.args.JsonSave(
        {"step": step, "config": config_to_json(config)}))


@pytest.fixture
def study(demo, tmp_path):
    """A short demo whose distillation is done and whose image stage has begun; make(**changes)."""
    def make(seed=0, overrides=()):
        return {name: demo.stage_config(name, path, tmp_path, False, seed, list(overrides))
                for name, path in demo.stages(False, False).items()}

    configs = make()
    begun(tmp_path / "consistency", configs["consistency"], configs["consistency"].train.steps)
    begun(tmp_path / "image", configs["image"], 100)
    return make


def test_the_same_command_goes_on_in_silence(demo, study, tmp_path, capsys):
    demo.check_runs(study(), tmp_path)
    demo.check_runs(study(overrides=["--config.train.checkpoint_every=9"]), tmp_path)
    assert capsys.readouterr().err == ""


def test_another_seed_of_a_study_is_status_2_before_anything_runs(demo, study, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert demo.main(["--workdir", str(tmp_path), "--seed", "1"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "seed = 0 there, 1 here; use another --workdir" in said
    assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(tmp_path / "consistency")  # the unfinished stage alone
    assert demo.main(["--workdir", str(tmp_path), "--seed", "1"]) == 2
    assert "was begun with seed = 0, not 1" in capsys.readouterr().err


def test_other_settings_of_a_finished_stage_are_refused(demo, study, tmp_path):
    from apt_jax.errors import UserError

    for override in ("optimizer.learning_rate=1e-3", "train.steps=50"):
        with pytest.raises(UserError, match=override.split("=")[0]):
            demo.check_runs(study(overrides=[f"--config.{override}"]), tmp_path)
    # What the finished stage does not read changes only the one that can still warn.
    demo.check_runs(study(overrides=["--config.objective.adversarial.r1=false"]), tmp_path)


def test_stages_are_lengthened_with_a_word_to_those_after(demo, study, tmp_path, capsys):
    demo.check_runs(study(overrides=["--config.train.steps=9000"]), tmp_path)
    assert "image was begun with the consistency stage as it was" in capsys.readouterr().err


def test_the_clips_d_goes_on_from_the_image_stage_at_length_only(demo, tmp_path):
    for long, wanted in ((True, str(tmp_path / "image")), (False, "")):
        file = demo.stages(long, True)["video"]
        config = demo.stage_config("video", file, tmp_path, True, 0, [])
        assert config.init.discriminator == wanted


def test_families_have_their_own_files_and_lengths(demo, capsys, tmp_path):
    assert list(demo.stages(False, False)) == ["consistency", "image", "video"]
    found = demo.stages(False, False, "emoji_64")
    assert list(found) == ["pretrain", "consistency", "image", "video"]
    config = demo.stage_config("video", found["video"], tmp_path, True, 3, [])
    assert config.data.frames == (8,) and config.data.height == 64 and config.seed == 3
    assert config.init.generator == str(tmp_path / "image")
    assert config.init.diffusion == str(tmp_path / "pretrain")
    assert demo.main(["--family", "emoji_64", "--long", "--workdir", str(tmp_path)]) == 2
    assert "emoji_64 has one length; drop --long" in capsys.readouterr().err


def test_the_time_that_is_up_comes_as_a_signal_to_training(demo):
    from apt_jax.train.preemption import Preemption

    before = signal.getsignal(signal.SIGTERM)  # ray leaves its own in a process that used it
    limit = demo.Limit(0.2 / 60)
    with limit.training():
        time.sleep(0.4)  # before the loop listens: nothing is lost
        with Preemption() as stop:
            end = time.monotonic() + 20
            while not stop.asked(0) and time.monotonic() < end:
                time.sleep(0.01)
            assert stop.asked(0) == "SIGTERM"
    assert limit.over() and signal.getsignal(signal.SIGTERM) is before
    assert not demo.Limit(0).over() and threading.active_count() < 50


def test_what_was_measured_is_kept_for_the_same_recipe_only(demo, tmp_path):
    first = demo.Measured(tmp_path, {"seed": 0})
    first.put("image/apt_1", {"fd": 2.5})
    again = demo.Measured(tmp_path, {"seed": 0})
    assert again.get("image/apt_1") == {"fd": 2.5} and again.get("image/apt_2") is None
    assert demo.Measured(tmp_path, {"seed": 1}).get("image/apt_1") is None
    again.done()
    assert not list(tmp_path.iterdir())


def test_a_stage_that_was_moved_away_is_trained_and_measured_anew(demo, tmp_path, monkeypatch, capsys):
    """As the demo's own warning says; otherwise a finished job prints its table again."""
    from apt_jax.config import config_to_json

    words = ["--workdir", str(tmp_path)]
    configs = {name: demo.stage_config(name, path, tmp_path, False, 0, [])
               for name, path in demo.stages(False, False).items()}
    for name in configs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"seconds": 1.5}')
    recipe = {name: json.loads(config_to_json(config)) for name, config in configs.items()}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "report.html").write_text("")
    demo.Measured(tmp_path, recipe).put("image/apt_1", {"fd": 2.5})
    begun = []
    monkeypatch.setattr(demo, "train_all", lambda *_: begun.append(True))

    for runs in (None, demo.run_digests(tmp_path, configs)):
        summary = {"seed": 0, "seconds": {}} | ({} if runs is None else {"runs": runs})
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert demo.main(words) == 0 and not begun
    assert "report: " in capsys.readouterr().out
    (tmp_path / "video/metrics.jsonl").unlink()
    assert demo.main(words) == 1 and begun
    assert demo.Measured(tmp_path, recipe).get("image/apt_1") is None


def test_ablations_start_d_where_the_base_did(demo, tmp_path, monkeypatch, capsys):
    import ablations

    from apt_jax.config import save_json

    file = demo.stages(False, True)["image"]
    config = demo.stage_config("image", file, Path("study"), True, 0, [])
    save_json(config, tmp_path / "study/image/config.json")
    (tmp_path / "study/pretrain").mkdir()
    (tmp_path / "study/image/started_in.json").write_text(json.dumps({"directory": str(tmp_path)}))
    asked = []
    monkeypatch.setattr(ablations, "train_variant",
                        lambda name, config, args: asked.append(config) or sys.exit(7))
    command = ["--base", str(tmp_path / "study"), "--workdir", str(tmp_path / "ablations")]
    with pytest.raises(SystemExit):
        ablations.main(command)
    assert asked[0].init.diffusion == str(tmp_path / "study/pretrain")
    assert asked[0].init.generator == str(tmp_path / "study/consistency")
    begun(tmp_path / "ablations/no_r1", asked[0], 640)  # another variant, and for longer
    assert ablations.main([*command, "--steps", "350"]) == 2
    said = capsys.readouterr().err
    assert "objective.adversarial.r1 = True there, False here" in said and "ablations/no_r1" in said


@pytest.mark.parametrize("flags, says", [
    (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["--limit", "-1"], "--limit -1 is no number of minutes"), (["--limit", "nan"], "--limit nan")])
def test_a_wrong_flag_is_one_line(demo, capsys, tmp_path, flags, says):
    with pytest.raises(SystemExit) as ended:
        demo.main(["--workdir", str(tmp_path), *flags])
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said.startswith("demo: ") and says in said


@pytest.mark.parametrize("override", ["--config.seed=3", "--config.init.generator=runs/x"])
def test_what_a_study_sets_itself_is_no_override(demo, capsys, tmp_path, override):
    assert demo.main(["--workdir", str(tmp_path / "study"), override]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"demo: {override}: ") and "--seed" in said
    assert not (tmp_path / "study").exists()


def test_a_home_folder_is_one_folder(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    monkeypatch.setattr(demo, "run", lambda args, _: found.append(args.workdir) or 0)
    assert demo.main(["--workdir=~/study"]) == 0 and found == [tmp_path / "study"]


def test_an_interruption_says_that_the_same_command_goes_on(demo, capsys, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert demo.main(["--workdir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "demo: interrupted; the same command goes on\n"


def test_a_limit_that_is_over_between_stages_says_so(demo, capsys, tmp_path):
    limit = demo.Limit(1e-9)
    assert demo.train_all({"image": None}, tmp_path, limit) is None
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (f"{tmp_path}: the time is up before the image stage; the same command goes on")
