"""`apt-jax prepare` as a user runs it, also killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_media as tiny

from apt_jax.data import manifest
from apt_jax.data.captions import TextEncoder
from apt_jax.data.pipeline import open_dataset
from apt_jax.errors import UserError

try:
    TextEncoder()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

FLAGS = ["--sizes", "16x16", "--shard-records", "3", "--holdout", "0.2", "--threads", "1"]


def command(source, out, *more):
    return [sys.executable, "-m", "apt_jax", "prepare", "--source", str(source), "--out", str(out),
            *FLAGS, *more]


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_killed_and_repeated_ends_with_the_same_bytes(tmp_path):
    source = tiny.image_folder(tmp_path / "in", 40)
    (source / "broken.png").write_bytes(b"rubbish")
    (source / "broken.txt").write_text("a broken picture")
    whole = subprocess.run(command(source, tmp_path / "whole" / "data"), capture_output=True,
                           text=True, timeout=120)
    assert whole.returncode == 0, whole.stderr
    assert "1 entries were left out" in whole.stdout and "writing: 100%" in whole.stderr

    out = tmp_path / "killed" / "data"
    process = subprocess.Popen(command(source, out), stderr=subprocess.DEVNULL)
    notes = out / ".work"
    while process.poll() is None and len(list(notes.glob("*.arrayrecord.json"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert not (out / manifest.FILE).exists()
    again = subprocess.run(command(source, out, "--quiet"), capture_output=True, text=True,
                           timeout=120)
    assert again.returncode == 0 and "%" not in again.stderr, again.stderr
    assert files(out) == files(tmp_path / "whole" / "data")
    skipped = json.loads((out / "skipped.jsonl").read_text())
    assert skipped["name"] == "broken.png" and "UnidentifiedImageError" in skipped["reason"]
    train = open_dataset(out, "train")
    assert train.records + open_dataset(out, "holdout").records == 40
    assert train.text_width == 384


@pytest.mark.parametrize("more, words", [
    (["--sizes", "big"], "WIDTHxHEIGHT"),
    (["--background", "whitish"], "--background"),
    (["--holdout", "1"], "holdout = 1.0 is not allowed; give from 0 to less than 1"),
    (["--frames", "0"], "frames = 0 is not allowed; give one length or more, each from 1"),
    (["--max-tokens", "1"], "max_tokens = 1 is not allowed; give from 2 to 512"),
])
def test_wrong_flags_are_one_line(tmp_path, more, words, capsys):
    from apt_jax.cli.main import main

    source = tiny.image_folder(tmp_path / "in", 1)
    assert main([*command(source, tmp_path / "out")[3:], *more]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_a_data_set_that_lost_its_training_files_says_so(tmp_path, capsys):
    from apt_jax.cli.main import main
    from apt_jax.data.buckets import choose_split

    source, groups = tiny.image_folder(tmp_path / "in", 2), [f"group {i}" for i in range(40)]
    split = {choose_split(group, 0.2): group for group in groups}
    tiny.save_image(source / "cut.jpg")
    whole = (source / "cut.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(whole[:-60])  # its header still says how large it is
    tiny.write_table(source, [("cut.jpg", "x", split["train"]), ("p001.png", "x", split["holdout"])])
    assert main(command(source, tmp_path / "out", "--quiet")[3:]) == 0
    said = capsys.readouterr().out
    assert "no file of the split 'train' could be used" in said and "train on it with" not in said


def test_the_folder_may_be_the_output_of_nothing(tmp_path, capsys):
    from apt_jax.cli.main import main

    assert main(["prepare", "--source", str(tmp_path / "no"), "--out", str(tmp_path / "o")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "o")
