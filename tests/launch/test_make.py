"""The scripts that made the bundled files, where what they need is not there: one line."""

import importlib
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def script(monkeypatch):
    """script(name): a module of launch/."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    return importlib.import_module


def test_a_run_that_is_not_there(script, tmp_path, capsys):
    made = script("make_base")
    assert made.main(["--run", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("make_base: cannot read the config") and str(tmp_path / "no") in said


def test_a_package_and_tarballs_that_are_not_there(script, tmp_path, capsys, monkeypatch):
    made = script("make_emoji_pack")
    command = ["--tarballs", str(tmp_path / "no"), "--work", str(tmp_path / "work"), "--out",
               str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "emoji", None)  # as where it is not installed
    assert made.main(command) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "emoji is not installed" in said and "pip install emoji==2.16.0" in said
    monkeypatch.setattr(made, "english_names", dict)
    assert made.main(command) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "no") in said and "cannot be read" in said
