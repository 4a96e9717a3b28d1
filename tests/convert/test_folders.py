"""What is written whole or not at all never replaces what is read."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from apt_jax.convert import folders
from apt_jax.convert.folders import FILES, new_folder
from apt_jax.errors import UserError, disk_errors


@pytest.mark.parametrize("to", ["run", ".", "run/../run", "run/part", "run/weights"])
def test_the_input_is_never_replaced(tmp_path, to):
    source = tmp_path / "run"
    source.mkdir()
    (source / "weights").write_text("precious")
    (source / "part").mkdir()
    (source / "part" / "more").write_text("precious")
    with pytest.raises(UserError, match="give another --to"):
        with new_folder(tmp_path / to, True, (None, source)):
            raise AssertionError("nothing may be written")
    for file in ("weights", "part/more"):
        assert (source / file).read_text() == "precious"


def test_a_folder_inside_the_input_or_beside_it_is_fine(tmp_path):
    source = tmp_path / "run"
    source.mkdir()
    for to in (source / "export", tmp_path / "out"):
        with new_folder(to, False, (source,)) as part:
            (part / "a").write_text("new")
        assert (to / "a").read_text() == "new"


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        with new_folder(tmp_path / "out", False):
            raise ValueError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "says"), [
    ("file/x", "cannot be written .*a file lies where a folder is needed"),
    ("file", "is there already"),
    ("n" * 300, "cannot be written .*shorter path"),
    ("a" * 200 + "/" + "n" * 250, "cannot be written .*shorter path"),  # with the temporary suffix
    (".", "the folder you are in"),
    ("..", "the folder you are in"),
    ("/", "the folder you are in"),
    ("/proc", "root of a disk"),
    ("/proc/x/y", "/proc/x cannot be written"),
    ("loop/x", "cannot be written"),
])
def test_places_that_cannot_be_written(tmp_path, monkeypatch, to, says):
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_text("mine")
    (here / "loop").symlink_to("loop")
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=says) as error:
        with new_folder(to):
            raise AssertionError("nothing may be written")
    assert "\n" not in str(error.value) and ";" in str(error.value)
    assert (here / "file").read_text() == "mine"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    with new_folder(tmp_path / "disk" / "out") as part:
        (part / "old").write_text("old")
    (tmp_path / "link").symlink_to("disk/out")
    with new_folder(tmp_path / "link", True) as part:
        (part / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "disk" / "out").iterdir() if p.name != FILES] == ["a"]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    """One child is killed while it writes; another block of the same target is still at work."""
    code = ("import os, signal; from apt_jax.convert.folders import new_folder\n"
            f"with new_folder({str(tmp_path / 'out')!r}) as part:\n"
            "    (part / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code])
    (stale,) = tmp_path.iterdir()
    assert done.returncode == -9 and stale.name.endswith(".tmp") and (stale / "half").exists()
    with new_folder(tmp_path / "other") as beside, new_folder(tmp_path / "out") as part:
        assert not stale.exists()
        working = tmp_path / ".other.1.tmp"  # as a process of this number would name it
        working.mkdir()
        held = os.open(working, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        (part / "a").write_text("new")
        (beside / "a").write_text("new")
    with new_folder(tmp_path / "other", True):
        assert working.exists()
    os.close(held)
    with new_folder(tmp_path / "other", True):
        assert not working.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_what_was_there_stays_where_the_last_step_fails(tmp_path, monkeypatch):
    with new_folder(tmp_path / "out") as part:
        (part / "mine").write_text("x")
    real = os.replace

    def refuse(source, target):
        if str(source).endswith(f".out.{os.getpid()}.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(folders.os, "replace", refuse)
    with pytest.raises(UserError, match="out cannot be written .*check the disk"):
        with new_folder(tmp_path / "out", True):
            pass
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("[!.]*")] == ["out", "out/mine"]


@pytest.mark.parametrize(("code", "says"), [
    (errno.ENOSPC, "no space left while writing {}/a.json;"),
    (errno.EIO, "{}/a.json cannot be written"),
])
def test_a_fault_is_told_of_the_place_that_was_asked_for(tmp_path, code, says):
    """Not of the temporary folder, which is gone when the user reads it."""
    with pytest.raises(UserError) as error:
        with new_folder(tmp_path / "out.1.x") as part, disk_errors(part / ".a.json.12.tmp"):
            raise OSError(code, os.strerror(code))
    assert says.format(tmp_path / "out.1.x") in str(error.value)
    with pytest.raises(UserError) as error:
        with new_folder(tmp_path / "out.1.x") as part:
            raise OSError(code, os.strerror(code), str(part / "a.json"))
    assert ".tmp" not in str(error.value) and "out.1.x" in str(error.value)


def test_what_another_process_wrote_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="is there already"):
        with new_folder(tmp_path / "out"):
            with new_folder(tmp_path / "out2") as part:
                (part / "a").write_text("faster")
            os.rename(tmp_path / "out2", tmp_path / "out")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("[!.]*")] == ["out", "out/a"]


def test_overwrite_replaces_only_what_was_written_here(tmp_path):
    """A run, notes beside an export, a file: none of it is lost, and the line names the first."""
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "0").write_text("x")
    (run / "config.json").write_text('{"kind": "pipeline"}')
    (run / FILES).write_text("[]")
    (tmp_path / "file").write_text("mine")
    with new_folder(out) as part:
        (part / "vae").mkdir()
        (part / "vae" / "a").write_text("old")
    (out / "vae" / "__pycache__").mkdir()
    (out / "vae" / "__pycache__" / "a.pyc").write_text("")
    with new_folder(out, True) as part:
        (part / "a").write_text("new")
    (out / "notes").write_text("mine")
    for to, said in ((run, "checkpoints/0 and 1 more"), (out, "notes"), (tmp_path / "file", "file")):
        with pytest.raises(UserError, match=rf"files that convert did not write \({said}\); give"):
            with new_folder(to, True):
                raise AssertionError("nothing may be written")
    assert (out / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (run / "checkpoints" / "0").exists()
