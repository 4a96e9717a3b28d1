"""The Wan demo: its commands parse, hang together, and fit the pipeline that it makes."""

import importlib.util
import sys
from pathlib import Path

import pytest

from apt_jax.cli.main import parse_command
from apt_jax.config import load_config, validate
from apt_jax.config.preparation import load_preparation

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_wan", ROOT / "launch" / "demo_wan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_commands_follow_each_other(demo, tmp_path):
    """Every command parses, and what one reads an earlier one wrote."""
    made = {str(tmp_path / name) for name in ("source", "clips")}
    for name, words in demo.commands(tmp_path).items():
        args, _ = parse_command(words[0], words[1:])
        reads = {"convert": ("source", "checkpoint"), "sample": ("checkpoint",),
                 "prepare": ("source", "vae", "text_encoder"), "train": ()}[words[0]]
        needed = {getattr(args, key) for key in reads} - {None}
        if words[0] == "train":
            config = validate(load_config(args.config, args.overrides))
            needed |= {config.data.path, config.init.diffusion, config.init.generator} - {""}
            made.add(args.workdir)
        else:
            made.add(getattr(args, "to", None) or args.out)
        assert needed <= made | {args.workdir if words[0] == "train" else ""}, name


def test_sizes_fit(demo):
    """What is sampled is what was prepared and trained."""
    data = load_preparation(ROOT / "configs" / "wan_tiny_data.py")
    assert data.sizes == (f"{demo.WIDTH}x{demo.HEIGHT}",) and max(data.frames) == demo.FRAMES
    config = load_config(f"{ROOT / 'configs' / 'wan_tiny.py'}:video")
    assert 1 + 4 * (max(config.data.frames) - 1) == demo.FRAMES


def test_the_network_is_the_pipelines(monkeypatch):
    """configs/wan_tiny.py describes the transformer that the demo makes."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests" / "convert"), *sys.path])
    import tiny_pipelines

    from apt_jax.convert.tables.wan import CLASS, model_from

    card = {**tiny_pipelines.wan_transformer().config, "_class_name": CLASS}
    theirs = model_from(card, "the demo's")
    model = load_config(f"{ROOT / 'configs' / 'wan_tiny.py'}:video").model.to_dict()
    assert {key: model[key] for key in theirs} == theirs


def test_a_step_is_done_once(demo, tmp_path, capsys):
    """A second story skips what was done, and what follows a changed step is done again."""
    ran = []
    for again in range(3):
        story = demo.Story(tmp_path, 2)
        story.step("first", "one" if again < 2 else "another", lambda: ran.append("first"))
        story.step("second", "two", lambda: ran.append("second"))
    assert ran == ["first", "second"] * 2
    assert "done before" in capsys.readouterr().out
