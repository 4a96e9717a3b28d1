"""Who belongs to a job, which data a process reads, the watchdog and the local launcher."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from apt_jax.errors import UserError
from apt_jax.parallel.flags import environment_value
from apt_jax.parallel.mesh import make_mesh
from apt_jax.train import watchdog
from apt_jax.train.distributed import Job, describe, find_job, start
from apt_jax.train.preemption import Preemption

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
SLURM = {"SLURM_JOB_ID": "70000", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
         "SLURM_STEP_NODELIST": "gpu[004-007,9],x1"}
JOBSET = {"JOBSET_NAME": "apt", "REPLICATED_JOB_NAME": "slice", "JOB_COMPLETION_INDEX": "2",
          "JOB_INDEX": "1", "APT_JAX_PODS": "4", "APT_JAX_PROCESSES": "8"}
OURS = {"APT_JAX_COORDINATOR": "n1:99", "APT_JAX_PROCESSES": "2", "APT_JAX_PROCESS": "1"}


@pytest.mark.parametrize(("env", "flags", "job"), [
    ({}, {}, None),
    ({}, {"coordinator": "h:1", "processes": 3, "process": 2}, Job("h:1", 3, 2, None, "flags")),
    (SLURM, {"coordinator": "[::1]:7", "processes": 2, "process": 0},
     Job("[::1]:7", 2, 0, None, "flags")),
    (OURS, {}, Job("n1:99", 2, 1, None, "environment")),
    ({**OURS, "APT_JAX_PROCESSES": "1", "APT_JAX_PROCESS": "0"}, {}, None),
    (SLURM, {}, Job("gpu004:61808", 4, 3, None, "Slurm")),
    ({**SLURM, "SLURM_STEP_NODELIST": "a,b"}, {}, Job("a:61808", 4, 3, None, "Slurm")),
    ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, {},
     Job("gpu004:61808", 4, 3, (1,), "Slurm")),
    ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
    # The shells of sbatch and of salloc.
    ({k: v for k, v in SLURM.items() if "STEP" not in k}, {}, None),
    ({**SLURM, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, {}, None),
    ({**SLURM, "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "9"}, {},
     Job("gpu004:61808", 9, 3, None, "Slurm")),
    (JOBSET, {}, Job("apt-slice-0-0.apt:8476", 8, 6, None, "JobSet")),
    ({"APT_JAX_DISTRIBUTED": "1"}, {}, Job(None, source="jax")),
])
def test_a_job_is_found(env, flags, job):
    assert find_job(env, **flags) == job


@pytest.mark.parametrize(("env", "flags", "says"), [
    ({}, {"processes": 2}, "--coordinator and --process not given"),
    ({}, {"coordinator": "h:1", "processes": 2, "process": 2}, "must lie in 0 to 1"),
    ({}, {"coordinator": "host", "processes": 2, "process": 0}, "must be HOST:PORT"),
    ({"APT_JAX_COORDINATOR": "h:1"}, {}, "APT_JAX_PROCESSES and APT_JAX_PROCESS not given"),
    ({**OURS, "APT_JAX_PROCESSES": "two"}, {}, "is no number"),
])
def test_half_a_job_is_named(env, flags, says):
    with pytest.raises(UserError, match=says):
        find_job(env, **flags)


def test_a_job_that_jax_cannot_find_says_what_to_set(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError) as error:
        start(find_job({}, automatic=True))
    assert "None" not in str(error.value)
    assert "jax finds no other processes here (coordinator_address should" in str(error.value)
    assert "--coordinator HOST:PORT --processes N --process I" in str(error.value)


def test_ctrl_c_on_one_of_several_processes_is_the_sigterm_that_jax_hears(monkeypatch):
    came = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("SIGTERM"))
    # A shell's background jobs are born ignoring SIGINT, and pytest with them.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Preemption():
            os.kill(os.getpid(), signal.SIGINT)
            while not came:
                time.sleep(0.01)
            with pytest.raises(KeyboardInterrupt):  # the second
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ours)
    assert came == ["SIGTERM"]


def test_a_process_says_where_it_is():
    said = describe(make_mesh({"fsdp": 4, "context": 2}))
    assert "process 0 of 1" in said and f"pid {os.getpid()}" in said
    assert said.endswith("at fsdp 0-3 of 4, context 0-1 of 2")


def test_a_hanging_step_ends_the_process_with_its_stacks():
    code = ("import time\nfrom apt_jax.train.watchdog import Watchdog\n"
            "def waiting_for_the_others():\n    time.sleep(60)\n"
            "with Watchdog(0.2, 0) as dog:\n    dog.step()\n    waiting_for_the_others()\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "waiting_for_the_others" in done.stderr


def test_how_long_a_step_may_take_follows_from_those_before(monkeypatch):
    """Hours an update on a few devices are no hang; a step of that length is known after the second
    one began, because the loop waits for a step while the next is under way."""
    now, limits = [0.0], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later",
                        lambda limit, **_: limits.append(limit))
    with watchdog.Watchdog(1800, 3600) as dog:
        now[0] = 900  # restored
        dog.step(new=True)
        now[0] = 960  # compiled and started
        dog.step()
        now[0] = 4460  # the first one is done
        dog.step()
        now[0] = 7960
        dog.step(new=True)  # a batch of clips
        dog.slowly()
        now[0] = 17960  # written
        dog.step()
        now[0] = 21960  # waited for, because a checkpoint is due after every step
        dog.slowly()
        now[0] = 31960
        dog.step()
    assert limits == [3600, 3600, 3600, 1800 + 7000, 8800, 8800, 8800, 9800, 9800]
    limits.clear()
    with watchdog.Watchdog(0, 3600) as dog:
        dog.step()
    assert not limits


def launcher(*arguments, code, **options):
    command = [sys.executable, str(LOCAL), *arguments, "--", sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


def test_the_launcher_starts_all_again_when_one_fails(tmp_path):
    """Process 1 fails in the first attempt; process 0 waits for it in vain."""
    code = f"""
import os, pathlib, sys, time
me, folder = os.environ["APT_JAX_PROCESS"], pathlib.Path({str(tmp_path)!r})
print("device count", os.environ["XLA_FLAGS"][-1], "of", os.environ["APT_JAX_PROCESSES"])
first = not (folder / me).exists()
(folder / me).touch()
if first:
    sys.exit(3) if me == "1" else time.sleep(300)
"""
    job = launcher("--processes", "2", "--cpu", "--devices", "4", "--restarts", "1", code=code)
    out, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "[1] device count 4 of 2\n" in out
    assert "ended with status 3; starting all again" in said


def test_the_launcher_gives_up_and_passes_signals_on(tmp_path):
    job = launcher("--processes", "2", code="import sys; sys.exit(5)")
    assert "giving up" in job.communicate(timeout=300)[1]
    assert job.returncode == 5
    code = ("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(0))\n"
            "print('up', flush=True)\ntime.sleep(300)\n")
    job = launcher("--processes", "2", "--restarts", "3", code=code)
    assert "up" in job.stdout.readline() and "up" in job.stdout.readline()
    begun = time.monotonic()
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=300)
    assert job.returncode == 0 and time.monotonic() - begun < 60


@pytest.mark.parametrize(("ends", "status", "attempts"), [
    ("75 75", 75, 1),  # saved: for whoever started the launcher to go on
    ("0 75", 75, 1),
    ("2 0", 2, 1),
    ("-9 0", 137, 2),
])
def test_the_launcher_does_with_a_status_what_the_docs_say(ends, status, attempts, tmp_path):
    code = f"""
import os, pathlib, sys, time
me, folder = int(os.environ["APT_JAX_PROCESS"]), pathlib.Path({str(tmp_path)!r})
(folder / str(os.getpid())).touch()
end = time.monotonic() + 60
while len(list(folder.iterdir())) % 2 and time.monotonic() < end:  # both are up
    pass
status = int({ends!r}.split()[me])
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""
    job = launcher("--processes", "2", "--restarts", "1", code=code)
    said = job.communicate(timeout=300)[1]
    assert job.returncode == status, said
    assert len(list(tmp_path.iterdir())) == 2 * attempts
    assert ("giving up" in said) == (attempts == 2) and ("is wrong" in said) == (status == 2)


@pytest.mark.parametrize(("states", "status"), [
    ([-6, 2], 2), ([2, 75], 2), ([75, -9], 137), ([0, 75, 1], 1), ([0, 75], 75), ([0, 0], 0)])
def test_of_several_statuses_the_one_that_says_why(states, status):
    assert runpy.run_path(str(LOCAL))["verdict"](states) == status


def test_the_launcher_lets_the_others_leave_when_one_has_saved(tmp_path):
    code = f"""
import os, pathlib, sys, time
if os.environ["APT_JAX_PROCESS"] == "1":
    time.sleep(1)
    pathlib.Path({str(tmp_path)!r}, "saved").touch()
sys.exit(75)
"""
    job = launcher("--processes", "2", code=code)
    job.communicate(timeout=300)
    assert job.returncode == 75 and (tmp_path / "saved").exists()


@pytest.mark.parametrize(("arguments", "visible", "says"), [
    (("--processes", "2", "--", "no-such-command"), "", "there is no command 'no-such-command'"),
    (("--processes", "0", "--", "true"), "", "--processes 0; give 1 or more"),
    (("--processes", "1", "--restarts", "-1", "--", "true"), "", "--restarts -1; give 0 or more"),
    (("--processes", "2", "--gpus", "-2", "--", "true"), "", "--gpus -2; give 0 or more"),
    (("--processes", "4", "--gpus", "4", "--", "true"), "0,1", "=0,1 names 2; give fewer"),
    (("--processes", "2", "--gpus", "2", "--", "true"), "", "= names 0; give fewer"),
])
def test_the_launcher_complains_in_one_line(arguments, visible, says):
    done = subprocess.run([sys.executable, LOCAL, *arguments], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": visible})
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_processes_share_the_gpus_of_the_machine_out():
    """Without --gpus too: NCCL refuses two processes on one GPU."""
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    job = launcher("--processes", "2", code=code, env={**env, "CUDA_VISIBLE_DEVICES": "1,3,5,7"})
    out, said = job.communicate(timeout=300)
    assert job.returncode == 0 and sorted(out.splitlines()) == ["[0] 1,3", "[1] 5,7"], said
    job = launcher("--processes", "2", code=code, env={**env, "CUDA_VISIBLE_DEVICES": "1"})
    assert "1 GPUs cannot be shared out to 2 processes" in job.communicate(timeout=300)[1]
    assert job.returncode == 2


def test_the_launcher_sets_flags_and_memory_of_gpus():
    code = "import os\nfor n in ('XLA_FLAGS', 'CUDA_VISIBLE_DEVICES'): print(os.environ[n])\n"
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    job = launcher("--processes", "2", "--gpus", "2", code=code + (
        "print(os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])"),
        env={**env, "CUDA_VISIBLE_DEVICES": "4,6,7", "XLA_FLAGS": "--xla_mine=1"})
    out, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    left_out = [line.split("left out ")[1].split(":")[0] for line in said.splitlines()]
    flags = f"{environment_value('gpu', without=left_out)} --xla_mine=1"
    for process, device in enumerate("46"):
        mine = [line for line in out.splitlines() if line.startswith(f"[{process}]")]
        assert mine == [f"[{process}] {text}" for text in (flags, device, "0.94")]
