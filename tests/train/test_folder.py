"""One run at a time in a run folder."""

import errno
import os
import socket

import pytest
from tiny import emoji_config

from apt_jax.errors import UserError
from apt_jax.train import folder
from apt_jax.train.folder import LOCK, RunFolder
from apt_jax.train.loop import train


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(folder, "SECONDS_HERE", 0.0)
    monkeypatch.setattr(folder, "SECONDS_ELSEWHERE", 0.3)


def test_a_second_run_is_refused_and_touches_nothing(tmp_path):
    with RunFolder(tmp_path / "run"):
        half = tmp_path / "run/checkpoints/3.orbax-checkpoint-tmp"  # the first run writes it
        half.mkdir(parents=True)
        with pytest.raises(UserError) as error:
            train(emoji_config(), tmp_path / "run", quiet=True)
        assert str(error.value) == (
            f"another process (pid {os.getpid()} on {socket.gethostname()}) trains in "
            f"{tmp_path}/run; wait for its end, or use another --workdir")
        assert half.is_dir()
    with RunFolder(tmp_path / "run"):  # the first has ended
        assert (tmp_path / "run" / LOCK).exists()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints"]


def test_what_a_killed_process_left_is_no_lock(tmp_path):
    (tmp_path / LOCK).write_text("1 elsewhere another-start-of-a-machine-with-a-longer-name")
    with RunFolder(tmp_path):
        assert (tmp_path / LOCK).read_text().split()[:2] == [str(os.getpid()),
                                                             socket.gethostname()]


def test_a_lost_hosts_lock_is_waited_for(tmp_path, capsys):
    """Its disk gives it up later; status 2 would keep the scheduler from starting again."""
    with RunFolder(tmp_path):
        (tmp_path / LOCK).write_text(f"7 {socket.gethostname()} another-machine")
        with pytest.raises(UserError, match="pid 7 on "), RunFolder(tmp_path):
            pass
    assert capsys.readouterr().err.count("is held by pid 7 on ") == 1


def test_a_lock_that_went_away_between_is_none(tmp_path, monkeypatch):
    """The holder's file is taken away after it was opened and before it was locked."""
    real, times = folder.fcntl.flock, []

    def flock(file, how):
        times.append(1)
        if len(times) == 1:
            (tmp_path / LOCK).unlink()
        real(file, how)

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    monkeypatch.setattr(folder, "SECONDS_HERE", 60.0)
    with RunFolder(tmp_path):
        assert (tmp_path / LOCK).exists() and len(times) == 2


def test_a_disk_without_locks_takes_the_run(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    with RunFolder(tmp_path), RunFolder(tmp_path):
        pass


def test_several_processes_hold_it_as_one(tmp_path, monkeypatch):
    with RunFolder(tmp_path):
        monkeypatch.setattr(folder.jax, "process_index", lambda: 1)
        with RunFolder(tmp_path):
            pass
