"""Whole runs of the loop on the bundled data, in this process."""

import json
import os
import resource
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import emoji_config, random_weights

from apt_jax.cli.main import main
from apt_jax.errors import UserError
from apt_jax.parallel.mesh import make_mesh
from apt_jax.train import loop
from apt_jax.train.checkpoint import Checkpoints
from apt_jax.train.loop import train
from apt_jax.train.state import set_up
from apt_jax.train.watchdog import Watchdog
from apt_jax.weights import export_run, load_generator

pytestmark = pytest.mark.slow


def final_state(workdir, config):
    """The newest checkpoint's state as numpy, however far the run got."""
    config = config.copy_and_resolve_references()
    config.train.steps = 10**6
    checkpoints = Checkpoints(workdir, config)
    try:
        restored = checkpoints.restore(set_up(config, make_mesh(config.mesh)).abstract)
        return jax.tree.map(np.array, restored.state)
    finally:
        checkpoints.close()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """{step: metrics without the clock}."""
    return {line["step"]: {k: v for k, v in line.items() if k != "seconds"}
            for line in logged(workdir)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of four updates; (folder, config, its final state)."""
    folder, config = tmp_path_factory.mktemp("whole"), emoji_config(train__log_every=1)
    summary = train(config, folder, quiet=True)
    assert summary["status"] == "complete" and summary["step"] == 4
    assert summary["metrics"]["loss"] > 0
    return folder, config, final_state(folder, config)


@pytest.fixture
def copy(whole, tmp_path):
    """That run in a folder of the test's own."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    return folder


def test_a_run_folder_holds_everything(whole):
    folder, config, state = whole
    assert json.loads((folder / "config.json").read_text())["stage"] == "pretrain"
    assert "jax" in json.loads((folder / "versions.json").read_text())["packages"]
    assert json.loads((folder / "started_in.json").read_text()) == {"directory": os.getcwd()}
    assert [line["step"] for line in logged(folder)] == [1, 2, 3, 4]
    assert {"loss", "gradient_norm", "flow_loss", "seconds"} <= set(logged(folder)[0])
    assert list((folder / "tensorboard").iterdir())
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()
                  if p.name.isdigit()) == ["2", "4"]
    assert state["step"] == 4
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    assert max(sizes) < 16 * 2**20


def test_a_resumed_run_equals_the_undisturbed_one(whole, tmp_path):
    """Mistake 6 of method.md: step, optimiser state, key and data position all come back."""
    _, config, want = whole
    half = emoji_config(train__log_every=1, train__steps=2)
    train(half, tmp_path, quiet=True)
    before = final_state(tmp_path, half)
    assert before["step"] == 2
    moments = jax.tree.leaves(before["generator_opt"])
    assert any(np.abs(m).max() > 0 for m in moments)
    train(config, tmp_path, quiet=True)
    assert_same(final_state(tmp_path, config), want)
    assert losses(tmp_path) == losses(whole[0])


def test_pictures_while_training_change_nothing(whole, tmp_path):
    _, config, want = whole
    shown = emoji_config(train__log_every=1, train__sample_every=1, sample__steps=1)
    train(shown, tmp_path, quiet=True)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 4
    assert_same(final_state(tmp_path, config), want)
    assert losses(tmp_path) == losses(whole[0])


def test_a_sampler_that_fails_costs_no_update(copy, monkeypatch):
    """Its program is another, and may be the first that the device has no memory for."""
    def fails(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("apt_jax.train.previews.Previews.write", fails)
    config = emoji_config(train__steps=5, train__sample_every=5, sample__steps=1)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        train(config, copy, quiet=True)
    assert (copy / "checkpoints" / "5").is_dir()


def test_a_finished_run_returns_at_once(copy, whole, capsys):
    before = (copy / "config.json").stat().st_mtime_ns
    other = emoji_config(train__log_every=3, train__checkpoint_every=7)  # same course
    summary = train(other, copy)
    assert (summary["status"], summary["step"]) == ("complete", 4)
    assert "already trained" in capsys.readouterr().err
    assert (copy / "config.json").stat().st_mtime_ns == before
    (copy / "config.json").unlink()
    train(whole[1], copy)
    assert json.loads((copy / "config.json").read_text())["train"]["steps"] == 4


def test_a_finished_run_is_not_relabelled(copy, capsys):
    """Another seed and rate trained nothing: the folder keeps what it says, and the status is 2."""
    before = (copy / "config.json").read_bytes()
    config = copy / "config.py"
    config.write_text("""from apt_jax.config import load_json
def get_config():
    return load_json(__file__.replace('.py', '.json'))
""")
    assert main(["train", "--config", str(config), "--workdir", str(copy), "--config.seed=1",
                 "--config.optimizer.learning_rate=0.5"]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    for part in ("trained to its end (step 4)", "seed = 0 there, 1 here",
                 "learning_rate = 0.001 there, 0.5 here", "use another --workdir"):
        assert part in said
    assert (copy / "config.json").read_bytes() == before


@pytest.mark.parametrize("refused", [{"data__path": "/nonexist"},
                                     {"init__generator": "/nonexist"}])
def test_a_refused_start_leaves_the_folder_as_it_was(copy, refused, tmp_path):
    """An unfinished run keeps its labels, without which it is not read; no new one is left."""
    stage = "consistency" if "init__generator" in refused else "pretrain"
    config = emoji_config(stage, init__diffusion="/nonexist", train__steps=9, **refused)
    if stage == "pretrain":
        before = sorted((p, p.stat().st_mtime_ns) for p in copy.rglob("*.json*"))
        with pytest.raises(UserError):
            train(config, copy, quiet=True)
        assert sorted((p, p.stat().st_mtime_ns) for p in copy.rglob("*.json*")) == before
        load_generator(copy)
    with pytest.raises(UserError):
        train(config, tmp_path / "new/run", quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_signal_in_the_last_step_has_nothing_left_to_stop(copy, monkeypatch, capsys):
    """The run is complete: a scheduler must not queue it again. And it said where it ran."""
    class Signalled(loop.Preemption):
        def asked(self, step):
            return "SIGTERM"

    monkeypatch.setattr(loop, "Preemption", Signalled)
    waits = []
    monkeypatch.setattr(loop, "Watchdog", lambda *seconds: waits.append(seconds) or Watchdog(0, 0))
    summary = train(emoji_config(train__log_every=1, train__steps=5, train__hang_seconds=77.0),
                    copy, quiet=True)
    assert (summary["status"], summary["step"]) == ("complete", 5)
    said = capsys.readouterr().err
    assert "SIGTERM" not in said
    assert f"tiny: process 0 of 1: pid {os.getpid()} on " in said
    assert jax.device_count() > 1 and waits == [(77.0, 3600.0)]  # devices wait for each other too


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(copy, whole, capsys):
    for path in (copy / "checkpoints" / "4" / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for path in (copy / "checkpoints" / "4" / "state").glob("ocdbt*/d/*"):
        path.write_bytes(b"")
    model, params = load_generator(copy, "raw")  # of step 2
    assert model.width == 16 and np.isfinite(jax.tree.leaves(params)[0]).all()
    train(whole[1], copy, quiet=True)
    said = capsys.readouterr().err
    assert "checkpoint 4 cannot be read" in said and "from step 2" in said
    assert (copy / "broken_checkpoints" / "4").is_dir()
    assert_same(final_state(copy, whole[1]), whole[2])
    assert losses(copy) == losses(whole[0])


def test_no_readable_checkpoint_is_an_error_not_a_new_start(copy, whole):
    for step in ("2", "4"):
        shutil.rmtree(copy / "checkpoints" / step / "state")
    with pytest.raises(UserError, match="none of the checkpoints .* can be read"):
        train(whole[1], copy, quiet=True)
    assert (copy / "checkpoints" / "4").is_dir()


def test_checkpoints_that_differ_between_processes_are_an_error_too(copy, whole, monkeypatch):
    monkeypatch.setattr("apt_jax.train.checkpoint.same_everywhere", lambda steps: [])
    with pytest.raises(UserError, match=r"no common checkpoint in .* \[4\]"):
        train(whole[1], copy, quiet=True)


@pytest.mark.parametrize(("overrides", "says"), [
    ({"model__mlp_ratio": 4}, r"model.mlp_ratio = 2\.0 there, 4\.0 here"),
    ({"optimizer__name": "adamw"}, "optimizer.name = 'rmsprop' there, 'adamw' here"),
    ({"stage": "consistency", "init__diffusion": "bundled:base"},
     "stage = 'pretrain' there, 'consistency' here"),
])
def test_a_checkpoint_of_another_config_is_refused_by_name(copy, overrides, says):
    with pytest.raises(UserError, match=says) as error:
        train(emoji_config(**{"stage": "pretrain", **overrides}), copy, quiet=True)
    assert "\n" not in str(error.value)
    assert json.loads((copy / "config.json").read_text())["model"]["mlp_ratio"] == 2


def test_an_unfinished_run_goes_on_changed_with_a_warning(copy):
    config = emoji_config(train__batch_size=16, train__steps=5, optimizer__learning_rate=2e-3)
    said = []
    checkpoints = Checkpoints(copy, config, said.append)
    try:
        restored = checkpoints.restore(set_up(config, make_mesh(config.mesh)).abstract)
    finally:
        checkpoints.close()
    assert restored.step == 4
    assert [line.split("with another ")[1] for line in said] == [
        "optimizer.learning_rate = 0.001 there, 0.002 here", "train.batch_size = 8 there, 16 here"]


def test_a_folder_that_cannot_be_one_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for name, says in (("file", "a file lies where a folder is needed"),
                       ("file/run", "a file lies where a folder is needed"),
                       ("x" * 300, "give a shorter path")):
        with pytest.raises(UserError, match=says):
            train(emoji_config(), tmp_path / name, quiet=True)
    with pytest.raises(UserError, match="--workdir is empty"):
        train(emoji_config(), "")


@pytest.mark.parametrize(("size", "file"), [(1000, "/run"), (30_000, "/run/checkpoints")])
def test_a_disk_that_does_not_take_the_run_is_one_too(copy, size, file):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match=f"no space left while writing .*{file}; free some"):
            train(emoji_config(train__log_every=1, train__steps=5), copy, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_non_finite_update_stops_and_is_not_saved(copy):
    config = emoji_config(train__steps=8, train__log_every=1, optimizer__learning_rate=3e38)
    with pytest.raises(UserError) as error:
        train(config, copy, quiet=True)
    for part in ("step 5", "checkpoint is step 4", "learning_rate"):
        assert part in str(error.value)
    kept = sorted(p.name for p in (copy / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == ["2", "4"]
    assert [line["step"] for line in logged(copy)] == [1, 2, 3, 4]


class NoEncoder:
    """The text encoder where its weights are not installed."""

    width = 384

    def __init__(self):
        raise UserError("no text encoder here")


@pytest.fixture
def patience(monkeypatch):
    """What a run did, in order: "step" and "slowly", as its watchdog was told, "pictures" and
    "checkpoint"."""
    from apt_jax.train.previews import Previews

    done = []

    def told(owner, name, as_name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (done.append(as_name), real(*a, **k))[1])

    told(Watchdog, "step", "step")
    told(Watchdog, "slowly", "slowly")
    told(Previews, "write", "pictures")
    told(Checkpoints, "save", "checkpoint")
    return done


def test_the_stages_follow_each_other(whole, tmp_path, capsys, monkeypatch, patience):
    """Consistency from the pre-training run, then APT from both, with pictures of clips; pictures
    and checkpoints have a first step's time."""
    monkeypatch.setattr("apt_jax.data.captions.TextEncoder", NoEncoder)
    base, consistency = str(whole[0]), tmp_path / "consistency"
    train(emoji_config("consistency", train__steps=2, init__diffusion=base,
                       train__sample_every=2, train__sample_prompts=("no such caption",)),
          consistency, quiet=True)
    said = capsys.readouterr().err
    assert "no such caption" in said and "no text encoder here" in said
    assert patience[:7] == ["slowly", "step", "step", "slowly", "checkpoint", "slowly", "pictures"]
    with Image.open(consistency / "samples" / "step_000002.png") as picture:
        assert min(picture.size) >= 90
    _, teacher = load_generator(base, "ema")
    _, student = load_generator(consistency, "raw")
    assert any((a != b).any() for a, b in zip(
        jax.tree.leaves(teacher), jax.tree.leaves(student), strict=True))

    clips = emoji_config("adversarial", train__steps=2, init__diffusion=base,
                         init__generator=str(consistency), data__frames=(2,),
                         train__sample_every=2, train__log_every=2,
                         train__clip_batch_size=15, train__accumulate=2)
    capsys.readouterr()
    summary = train(clips, tmp_path / "clips", quiet=True)
    # Of batch_size = 8, which 2 microbatches on 8 devices do not divide, there is none.
    assert "clip_batch_size = 15 is filled up with empty samples, 1 of" in capsys.readouterr().err
    assert {"discriminator/loss", "generator/loss", "discriminator/r1"} <= set(summary["metrics"])
    with Image.open(tmp_path / "clips" / "samples" / "step_000002.webp") as picture:
        assert picture.n_frames == 2


def test_d_starts_from_the_diffusion_weights_and_g_from_its_own(tmp_path):
    from apt_jax.train.state import init_state

    diffusion = random_weights(tmp_path / "diffusion", 1)
    distilled = random_weights(tmp_path / "distilled", 2)
    config = emoji_config("adversarial", init__diffusion=diffusion, init__generator=distilled)
    state = init_state(config, set_up(config, make_mesh(config.mesh)))
    _, d, g = None, load_generator(diffusion)[1], load_generator(distilled)[1]
    assert_same(jax.tree.map(np.array, state["discriminator"]["backbone"]), d["backbone"])
    assert_same(jax.tree.map(np.array, state["generator"]), g)
    assert_same(jax.tree.map(np.array, state["generator_ema"]), g)


def test_the_teacher_is_guided_by_the_data_sets_negative_prompt(tmp_path, monkeypatch):
    from apt_jax.train import loop

    class Enough(Exception):
        pass

    real = loop.frozen_inputs

    def stop(*given):
        raise Enough(real(*given))

    config = emoji_config("consistency", init__diffusion=random_weights(tmp_path / "diffusion"))
    dataset = loop._open(config)
    dataset.negative_text = np.full_like(dataset.null_text, 7.0)
    dataset.negative_mask = ~dataset.null_mask
    monkeypatch.setattr(loop, "frozen_inputs", stop)
    with pytest.raises(Enough) as caught:
        train(config, tmp_path / "run", quiet=True, dataset=dataset)
    (frozen,) = caught.value.args
    np.testing.assert_array_equal(frozen["null_text"], dataset.negative_text)
    np.testing.assert_array_equal(frozen["null_mask"], dataset.negative_mask)


def test_an_exported_run_is_the_same_generator(whole, tmp_path):
    export_run(whole[0], tmp_path / "out", card={"made_by": "a test"})
    model, params = load_generator(tmp_path / "out")
    assert_same(params, jax.tree.map(np.asarray, whole[2]["generator_ema"]))
    card = json.loads((tmp_path / "out" / "config.json").read_text())
    assert card["made_by"] == "a test" and card["data"]["height"] == 4
    assert model.rope_axes == (2, 2, 4)
