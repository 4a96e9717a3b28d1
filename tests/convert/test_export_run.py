"""Exporting runs: which weights, which base, what the card tells.

The runs were not trained: their checkpoints hold random weights.
"""

import json

import jax
import numpy as np
import pytest
import synthetic

from apt_jax.cli import main as cli
from apt_jax.config import base_config, save_json
from apt_jax.convert.exporting import export_folder
from apt_jax.convert.families import family_of_transformer
from apt_jax.convert.provenance import history
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.tensor_files import open_folder
from apt_jax.weights import load_generator, open_generator

STEM = "diffusion_pytorch_model"


def params(which, seed=0):
    rng = np.random.default_rng([seed, which == "ema"])
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32),
                        make_generator(synthetic.WAN).abstract())


def save_checkpoint(folder, config, step=3):
    """What train/checkpoint.py writes, of the generator and its average alone."""
    from apt_jax.train.checkpoint import Checkpoints

    state = {"generator": params("raw"), "generator_ema": params("ema")}
    checkpoints = Checkpoints(folder, config)
    checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), {}, 0.0)
    checkpoints.close()


def make_run(folder, stage, **init):
    config = base_config()
    config.name, config.stage = folder.name, stage
    for key, value in synthetic.WAN.items():
        config.model[key] = value
    config.model.rope_axes = (8, 12, 12)  # Wan does not read it
    config.sample.two_step_time = 0.6
    config.sample.fps = 12.5
    config.data.frames = (1, 21)
    for key, value in init.items():
        config.init[key] = str(value)
    folder.mkdir()
    save_json(config, folder / "config.json")
    save_checkpoint(folder, config)
    return folder


@pytest.fixture
def chain(wan_components, tmp_path):
    """A consistency run from the component folder, and an adversarial one from that run."""
    first = make_run(tmp_path / "consistency_wan", "consistency", diffusion=wan_components)
    return make_run(tmp_path / "apt_wan", "adversarial", generator=first,
                    diffusion=wan_components / "transformer")


def test_the_history_of_a_run(chain, wan_components):
    past = history(str(chain))
    assert [stage.name for stage in past.stages] == ["apt_wan", "consistency_wan"]
    assert past.base == wan_components
    assert past.steps == [3, 3] and not past.missing
    assert history("bundled:base") == ([], [], None, [], "bundled:base")


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_asked_weights_in_the_dtypes_of_the_base(chain, wan_source, tmp_path, weights):
    from apt_jax.convert.families import transformer_plan
    from apt_jax.weights import flatten

    out = tmp_path / "out"
    asked = ["--weights", "raw"] if weights == "raw" else []  # the average unless asked otherwise
    assert cli.main(["convert", "export", "--checkpoint", str(chain), "--to", str(out), "--quiet",
                     *asked]) == 0
    plan, flat = transformer_plan(synthetic.WAN), flatten(params(weights))
    kinds = set()
    with open_folder(out / "transformer", STEM) as found:
        for leaf in plan.leaves.values():
            for layer, row in enumerate(leaf.parts):
                value = flat[leaf.name][layer] if leaf.stacked else flat[leaf.name]
                for name, part in zip(row, leaf.split(value), strict=True):
                    want = wan_source[1][name].dtype
                    assert found.tensors[name].dtype == want
                    assert found.read(name).tobytes() == part.astype(want).tobytes()
                    kinds.add(str(want))
    assert kinds == {"float32", "bfloat16"}
    shift = json.loads((out / "scheduler" / "scheduler_config.json").read_text())["shift"]
    assert shift == pytest.approx((999 * 0.6 / 0.4) ** 0.5, rel=1e-5)


def test_leaves_are_read_one_by_one(chain, caplog):
    """What an export reads of a run: any leaf, any layer, from the newest checkpoint that is
    whole."""
    import shutil

    from apt_jax.weights import flatten

    shutil.copytree(chain / "checkpoints" / "3", chain / "checkpoints" / "4")
    shutil.rmtree(chain / "checkpoints" / "4" / "state" / "d")  # the arrays
    with open_generator(chain, "raw") as (model, leaves):
        want = flatten(params("raw"))
        assert leaves.step == 3 and "step 4: " in caplog.text and "step 3 is used" in caplog.text
        assert model.width == 24 and leaves.shapes() == {k: v.shape for k, v in want.items()}
        for name in ("proj_out/bias", "backbone/blocks/attn/q/kernel",
                     "backbone/blocks/mlp/up/bias"):
            np.testing.assert_array_equal(leaves.read(name), want[name])
            np.testing.assert_array_equal(leaves.read(name, 1), want[name][1])
    jax.tree.map(np.testing.assert_array_equal, load_generator(chain, "raw")[1], params("raw"))


def test_the_card_tells_the_recipe(chain, tmp_path):
    out = export_folder(str(chain), tmp_path / "out", command="apt-jax convert export ...")
    text = (out / "README.md").read_text()
    for words in ("trained from tiny-wan", "consistency distillation: `consistency_wan`",
                  "adversarial post-training (APT): `apt_wan`", "R1 approximate, weight 100",
                  "the moving average", "bfloat16 (some tensors otherwise", "t = 0.6",
                  "num_frames=81", "fps=12.5)", "apt-jax convert export ...", '"stage": "adversarial"',
                  f"`apt_wan`, 3 of {base_config().train.steps} updates", "- one-step\n- apt\n",
                  "More were not trained for. No guidance"):
        assert words in text, words
    assert text.index("consistency_wan") < text.index("apt_wan`")
    raw = export_folder(str(chain), tmp_path / "raw", weights="raw")
    assert "Weights: raw" in (raw / "README.md").read_text()


def test_the_card_of_weights_that_are_not_distilled(wan_components, tmp_path):
    """Imported and not trained, and pre-trained: neither is said to be a one-step generator."""
    run = make_run(tmp_path / "fine", "pretrain", generator=wan_components)
    for checkpoint, words in ((run, "A diffusion model trained from tiny-wan"),
                              (wan_components, "The weights of tiny-wan, not trained further")):
        text = (export_folder(str(checkpoint), tmp_path / "out", overwrite=True)
                / "README.md").read_text()
        for needed in (words, "one step or two were not trained for", "license: apache-2.0"):
            assert needed in text, needed
        for untrue in ("one-step generator", "- one-step", "- apt\n", "2501.08316", "unchanged",
                       "leave the scale at 1"):
            assert untrue not in text, untrue
        assert ("moving average" in text) == (checkpoint == run)


@pytest.mark.parametrize(("stage", "true", "untrue"), [
    ("pretrain", ["A LoRA of rank 4 on org/base", "sample as with the base"], "one-step"),
    ("consistency", ["makes org/base a one-step generator", "- one-step"], "- apt\n"),
    ("adversarial", ["makes org/base a one-step generator", "- apt\n", "one inference step"],
     "as with the base"),
])
def test_the_card_of_a_lora_of_each_stage(stage, true, untrue):
    from apt_jax.convert.card import lora_card
    from apt_jax.convert.families import family_of_model
    from apt_jax.convert.provenance import History

    config = base_config()
    config.stage, config.lora.rank = stage, 4
    text = lora_card("x", family_of_model(synthetic.WAN), base={"hub": "org/base"},
                     past=History([config], [2], None, []), weights="ema", command="...")
    assert all(words in text for words in true), text
    assert untrue not in text.split("## Configuration")[0]


def test_a_base_that_is_not_here(chain, wan_components, tmp_path):
    """Named, and neither found nor given: nothing is written. Given: the rest is found."""
    import shutil

    moved = shutil.copytree(wan_components, tmp_path / "moved")
    lone = make_run(tmp_path / "lone", "adversarial", generator=tmp_path / "gone" / "cd",
                    diffusion=tmp_path / "gone" / "wan")
    with pytest.raises(UserError, match=r"lone began with .*gone/cd, which is not here; .*--base"):
        export_folder(str(lone), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = export_folder(str(lone), tmp_path / "out", base=str(moved))
    assert (out / "vae" / "config.json").is_file()
    assert "an earlier stage, cd: not at hand" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="dtype 'int4' is unknown"):
        export_folder(str(lone), tmp_path / "no", base=str(moved), dtype="int4")


def test_a_run_that_never_had_a_base(tmp_path):
    scratch = make_run(tmp_path / "scratch", "pretrain")
    out = export_folder(str(scratch), tmp_path / "out")
    assert (out / "config.json").is_file() and not (out / "vae").exists()
    text = (out / "README.md").read_text()
    assert "trained from no imported base" in text and "None is stated" in text


def test_the_card_of_a_demo_network(tmp_path):
    """Its start, the text it reads, licence and notices; and sampling says what it is made for."""
    from apt_jax.weights import generator_card

    out = export_folder("bundled:base", tmp_path / "base")
    text = (out / "README.md").read_text()
    for words in ("The weights of apt_jax's bundled:base, not trained further", "at most 8 of them",
                  "license: apache-2.0", "sentence-transformers/all-MiniLM-L6-v2", "in `NOTICE`"):
        assert words in text, words
    assert "Copyright (c) Microsoft Corporation" in (out / "NOTICE").read_text()
    with pytest.raises(UserError, match="for PyTorch alone .MMDiTShared.; give the run"):
        load_generator(out)
    config = base_config()
    config.name, config.stage, config.init.generator = "image", "consistency", "bundled:base"
    for key, value in generator_card("bundled:base")["model"].items():
        config.model[key] = tuple(value) if isinstance(value, list) else value
    config.data.max_text_tokens = 7
    run = tmp_path / "image"
    run.mkdir()
    save_json(config, run / "config.json")
    from apt_jax.train.checkpoint import Checkpoints

    _, weights = load_generator("bundled:base")
    checkpoints = Checkpoints(run, config)
    checkpoints.save(1, {"generator_ema": jax.tree.map(jax.numpy.asarray, weights)}, {}, 0.0)
    checkpoints.close()
    text = (export_folder(str(run), tmp_path / "out") / "README.md").read_text()
    assert "A one-step generator trained from apt_jax's bundled:base." in text
    assert "at most 7 of them" in text and "no imported base" not in text
    with pytest.raises(UserError, match="for PyTorch alone .MMDiTShared.; give the run"):
        family_of_transformer("MMDiTShared", "exported")


def test_relative_paths_are_those_of_the_training(wan_components, tmp_path, monkeypatch):
    """Trained in one folder, exported in another: the same base, by what training recorded."""
    from apt_jax.config import load_json
    from apt_jax.weights import record_directory

    work = tmp_path / "work"
    (work / "ckpt").mkdir(parents=True)
    (work / "ckpt" / "wan").symlink_to(wan_components)
    first = make_run(work / "cd", "consistency", diffusion="ckpt/wan")
    last = make_run(work / "apt", "adversarial", generator="cd", diffusion="ckpt/wan")
    monkeypatch.chdir(work)
    here = history("apt")
    assert [str(here.base), here.missing] == ["ckpt/wan", []]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"began with cd, which is not here"):
        export_folder(str(last), tmp_path / "out")
    monkeypatch.chdir(work)
    for run in (first, last):
        record_directory(run, load_json(run / "config.json"))
    monkeypatch.chdir(tmp_path)
    for run in (first, last):  # a look from a place where nothing is found changes nothing
        record_directory(run, load_json(run / "config.json"))
    past = history(last)
    assert [stage.name for stage in past.stages] == ["apt", "cd"] and not past.missing
    assert past.base.samefile(wan_components)
    assert (export_folder(str(last), tmp_path / "out") / "vae" / "config.json").is_file()


def test_a_start_in_the_home_folder_is_found_again(wan_components, tmp_path, monkeypatch):
    """`~` as a config holds it, with and without a record of where training was."""
    from apt_jax.config import load_json
    from apt_jax.weights import record_directory

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "wan").symlink_to(wan_components)
    run = make_run(tmp_path / "apt", "consistency", diffusion="~/ckpt/wan")
    for recorded in (False, True):
        if recorded:
            record_directory(run, load_json(run / "config.json"))
        for path in (run, "~/apt"):
            past = history(path)
            assert past.base.samefile(wan_components) and not past.missing
