"""What one process of a job does wrong ends the job soon, with a status that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(fault, workdir, *options):
    """Two processes under launch/local.py; (status, what they said)."""
    command = [sys.executable, str(HERE.parents[1] / "launch/local.py"), "--cpu", "--processes=2",
               *options, "--", sys.executable, str(HERE / "run_failing.py"), fault, "train",
               "--config", f"{HERE}/run_processes.py:pretrain,", "--workdir",
               str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("fault", "status", "says"), [
    ("user", 2, "[1] apt-jax: no data set at /data/clips on this host\n"),
    ("crash", 1, "[1] OSError: stale file handle\n"),
])
def test_a_process_that_fails_leaves_at_once_with_its_own_status(
        fault, status, says, tmp_path, monkeypatch):
    """jax's way out would wait for process 0 five minutes, and then abort with 134."""
    told = tmp_path / "told"
    told.mkdir()
    monkeypatch.setenv("APT_JAX_STATUS", str(told))
    found, said = run(fault, tmp_path)
    assert found == status, said
    assert [path.read_text() for path in told.iterdir()] == [f"{status}\n"]
    assert says in said and ("Traceback" in said) == (status == 1), said


@pytest.mark.parametrize(("steps", "says"), [
    ([4, 8], "process 1 sees no checkpoint in {}/checkpoints where the others see step 8; "),
    ([], "process 1 sees nothing of what process 0 writes into {}/checkpoints; "),
])
def test_a_folder_that_one_host_lacks_is_named_before_anything_is_written(steps, says, tmp_path):
    """Else the run would begin anew over the good one, and hang when it saves."""
    run_folder = tmp_path / "run"
    for step in steps:
        (run_folder / f"checkpoints/{step}").mkdir(parents=True)
    run_folder.mkdir(exist_ok=True)
    (run_folder / "metrics.jsonl").write_text('{"step": 8}\n')
    status, said = run("unmounted", run_folder)
    assert status == 2, said
    assert f"[0] apt-jax: {says.format(run_folder)}is the storage mounted there?" in said, said
    assert "going on" not in said and "Traceback" not in said
    assert (run_folder / "metrics.jsonl").read_text() == '{"step": 8}\n'
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.tmp"))


def test_the_one_that_says_what_is_wrong_may_end_last():
    """What is wrong for all, process 0 says, and the others may be gone before it."""
    late = ("import os, sys, time\nif os.environ['APT_JAX_PROCESS'] == '0':\n"
            "    time.sleep(1.5)\n    print('no such folder', flush=True)\nsys.exit(2)")
    done = subprocess.run([sys.executable, str(HERE.parents[1] / "launch/local.py"), "--cpu",
                           "--processes=2", "--", sys.executable, "-c", late],
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "[0] no such folder\n"), done.stderr
