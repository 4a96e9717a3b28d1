"""What one process of a job does wrong ends the job soon, with a status that says what to do."""

import os
import re
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=dict(os.environ))
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("fault", "status", "says"), [
    ("user", 2, "[1] apt-jax: no data set at /data/clips on this host\n"),
    ("crash", 1, "[1] OSError: stale file handle\n"),
])
def test_a_process_that_fails_leaves_at_once_with_its_own_status(fault, status, says, tmp_path):
    """jax's way out would wait for process 0 five minutes, and then abort with 134."""
    found, said = run(fault, tmp_path)
    assert found == status, said
    assert says in said and ("Traceback" in said) == (status == 1), said
