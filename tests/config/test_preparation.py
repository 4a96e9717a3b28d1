"""Configs of a preparation: the shipped ones, overrides, and what is refused."""

import ast
from pathlib import Path

import pytest

from apt_jax.config import load_config
from apt_jax.config.preparation import (
    FIELDS,
    base_preparation_config,
    describe_preparation,
    load_preparation,
)
from apt_jax.data.presets import MULTIPLE, SIZES, parse_sizes
from apt_jax.data.settings import Settings
from apt_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*_data.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_shipped_configs_load_and_say_how_they_are_run(path):
    config = load_preparation(path, ["--config.encode_batch=2"])
    assert config.encode_batch == 2 and config.is_locked
    Settings(sizes=parse_sizes(config.sizes), frames=config.frames, fps=config.fps,
             max_tokens=config.max_tokens, clips=config.clips).check(latents=True)
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config configs/{path.name}" in text and "Cost" in text and "Gives" in text


def test_wans_data_fit_wans_training():
    assert CONFIGS / "wan_1_3b_data.py" in FILES
    data = load_preparation(CONFIGS / "wan_1_3b_data.py")
    lengths = {1 + (n - 1) // 4 for n in data.frames}
    for stage in ("consistency", "apt_image", "apt_video"):
        train = load_config(CONFIGS / f"wan_1_3b_{stage}.py")
        assert set(train.data.frames) <= lengths
        assert train.data.max_text_tokens == data.max_tokens
        assert train.data.height == train.data.width == 0 and train.data.path == "data/clips"


def test_defaults_are_the_papers_clips():
    config = load_preparation(None)
    assert config.to_dict() == base_preparation_config().to_dict()
    assert (config.fps, config.frames, config.sizes) == (24.0, (1, 49), ("480p",))
    for field in FIELDS:
        assert f"--config.{field.key} " in describe_preparation()


@pytest.mark.parametrize("override, words", [
    ("--config.clip=1", "did you mean 'clips'"),
    ("--config.frames=a", "whole numbers"),
    ("--config.holdout=2", "must be < 1"),
    ("--config.text_dtype=float32", "bfloat16, int8"),
])
def test_wrong_overrides_are_refused(override, words):
    with pytest.raises(UserError, match=words):
        load_preparation(None, [override])


def test_presets_fit_the_vae_and_cost_alike():
    for sizes in SIZES.values():
        areas = [h * w for h, w in sizes]
        assert all(n % MULTIPLE == 0 for size in sizes for n in size)
        assert max(areas) < 1.1 * min(areas) and len(set(sizes)) == len(sizes)
        assert {(w, h) for h, w in sizes} == set(sizes)  # wide and tall
    assert parse_sizes(["480p", "32x16", "832x480"]) == (*SIZES["480p"], (16, 32))
    with pytest.raises(UserError, match="480p, 720p, 1024px"):
        parse_sizes(["360p"])
