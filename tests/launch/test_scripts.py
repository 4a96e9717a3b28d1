"""The scripts for Slurm and TPU VMs, with stand-ins for srun, scontrol and gcloud."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apt_jax.cli.main import main

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def stand_ins(tmp_path):
    """put(name, shell code): an executable on the PATH, which logs its arguments to calls.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name, code=""):
        (folder / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls.txt\n{code}\n')
        (folder / name).chmod(0o755)

    put.env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    put.calls = lambda: (tmp_path / "calls.txt").read_text().splitlines()
    return put


def test_the_scripts_are_bash():
    for name in ("slurm.sbatch", "tpu_vm.sh"):
        assert subprocess.run(["bash", "-n", LAUNCH / name]).returncode == 0


# -- Slurm -----------------------------------------------------------------------------------------


def sbatch(stand_ins, tmp_path, srun):
    """Runs the batch script as slurmd would; `srun` is its stand-in's code."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").touch()
    stand_ins("python", 'echo "--xla_of=$3 $4=$5"')
    stand_ins("srun", srun)
    stand_ins("scancel")
    stand_ins("scontrol")
    env = {**stand_ins.env, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path),
           "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "5",
           "SLURM_CPUS_PER_TASK": "64",
           "APT_JAX_VENV": str(tmp_path / "venv"), "APT_JAX_RESTARTS": "2", "XLA_FLAGS": "--mine"}
    return subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--config", "a b.py"], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("statuses", "ends", "queued"), [
    ("0", 0, False),
    ("2", 2, False),
    ("75", 0, True),
    ("1 137 0", 0, False),
    ("134 75", 0, True),
    ("1 1 143", 143, False),  # APT_JAX_RESTARTS=2
    # a task leaves its own status, srun tells that of one it killed
    ("143,2", 2, False),
    ("137,75", 0, True),
    ("137,1 143,75,2", 2, False),
    ("0,0", 0, False),
])
def test_slurm_starts_again_what_can_go_on(stand_ins, tmp_path, statuses, ends, queued):
    """The nth of `statuses`: what srun ends with in attempt n, then what tasks left."""
    code = f"""
[ "$1" = "--cpus-per-task=64" ] || exit 96  # srun does not take sbatch's by itself
shift
[ "$*" = "--kill-on-bad-exit=1 apt-jax train --preempted-status 75 --config a b.py" ] || exit 99
[ "$7" = "a b.py" ] && [ "$XLA_FLAGS" = "--xla_of=gpu --hosts=5 --mine" ] || exit 98
echo >> {tmp_path}/count
set -- {statuses}
shift $(($(wc -l < {tmp_path}/count) - 1))
IFS=, read -ra told <<< "$1"
[ -z "$(ls "$APT_JAX_STATUS")" ] || exit 97  # what an earlier attempt left
for i in "${{!told[@]}}"; do
  [ "$i" = 0 ] || echo "${{told[i]}}" > "$APT_JAX_STATUS/task$i"
done
exit "$told"
"""
    process = sbatch(stand_ins, tmp_path, code)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == ends, said
    assert said.count("slurm.sbatch: job 7,") == len(statuses.split())
    assert not list(tmp_path.glob(".apt-jax-*"))
    assert ("scontrol requeue 7" in stand_ins.calls()) == queued


@pytest.mark.parametrize("status", [75, 137])  # 137: one was slow to leave
def test_slurm_saves_when_the_time_is_up(stand_ins, tmp_path, status):
    """SIGUSR1 makes it signal the tasks, then it waits for them to leave."""
    process = sbatch(stand_ins, tmp_path, f"touch {tmp_path}/up; sleep 2; exit {status}")
    end = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "saving" in said and "is queued again" in said, said
    assert "scancel --signal=TERM 7" in stand_ins.calls()
    assert "scontrol requeue 7" in stand_ins.calls()


def test_the_test_of_slurm_knows_its_flags():
    """The real cluster takes root and minutes (launch/test_slurm.py); here: it can be read."""
    done = subprocess.run([sys.executable, LAUNCH / "test_slurm.py", "--help"], text=True,
                          capture_output=True)
    assert done.returncode == 0 and "slurm-wlm" in done.stdout


# -- TPU VMs ---------------------------------------------------------------------------------------


def tpu_vm(stand_ins, *arguments, **env):
    return subprocess.run(["bash", LAUNCH / "tpu_vm.sh", *arguments], capture_output=True,
                          text=True, env={**stand_ins.env, "TPU_POLL": "0", **env}, timeout=120)


def test_tpu_vms_are_asked_for_until_they_are_there(stand_ins, tmp_path):
    stand_ins("gcloud", f"""case "$*" in *describe*)
  if [ -e {tmp_path}/asked ]; then echo ACTIVE; else touch {tmp_path}/asked; echo WAITING; fi;;
esac""")
    done = tpu_vm(stand_ins, "create", TPU_NAME="x", TPU_TYPE="v6e-64", TPU_OPTIONS="--spot --a=b")
    assert done.returncode == 0, done.stderr
    first, *others = stand_ins.calls()
    assert "queued-resources create x" in first and "--accelerator-type=v6e-64" in first
    assert first.endswith("--spot --a=b") and len(others) >= 2
    stand_ins("gcloud", 'case "$*" in *describe*) echo FAILED;; esac')
    assert tpu_vm(stand_ins, "create").returncode == 1


def test_tpu_vms_run_the_command_as_it_was_given(stand_ins, tmp_path):
    """The remote line is run here: quotes survive, and systemd is told what to restart."""
    home = tmp_path / "apt_jax/.venv/bin"
    home.mkdir(parents=True)
    (home / "python").write_text('#!/bin/sh\necho "--xla_a=1 --xla_b=2"\n')
    (home / "python").chmod(0o755)
    stand_ins("gcloud", f'for a; do case "$a" in --command=*) cd {tmp_path}; bash -c "${{a#*=}}";; '
                        "esac; done")
    stand_ins("sudo", f'printf "%s\\n" "$@" > {tmp_path}/sudo.txt')
    done = tpu_vm(stand_ins, "train", "--config", "a b.py", "--workdir", "/data/it's",
                  LIBTPU_INIT_ARGS="--xla_a=3 --it's")
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "sudo.txt").read_text().splitlines()
    assert given[-7:] == [f"{home}/apt-jax", "train", "--preempted-status", "75", "--config",
                          "a b.py", "--workdir", "/data/it's"][-7:]
    assert "--setenv=LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2 --xla_a=3 --it's" in given
    assert "--setenv=APT_JAX_DISTRIBUTED=1" in given and "--property=Restart=on-failure" in given
    assert any("--worker=all" in call for call in stand_ins.calls())


def test_tpu_vms_get_this_checkout(stand_ins, tmp_path):
    """setup: an archive of HEAD goes to all hosts; what they run is bash."""
    if not (shutil.which("git") and (LAUNCH.parent / ".git").exists()):
        pytest.skip("not a git checkout")
    stand_ins("gcloud", f"""[ "$4" = scp ] && tar tzf "$5" > {tmp_path}/names
for a; do
  case "$a" in --command=*) bash -n -c "${{a#*=}}" || exit 9; echo "${{a#*=}}";; esac
done""")
    done = tpu_vm(stand_ins, "setup", TPU_SHARE="10.0.0.2:/data")
    assert done.returncode == 0, done.stderr
    assert "apt_jax/launch/tpu_vm.sh" in (tmp_path / "names").read_text().splitlines()
    assert "mount -o rw,hard 10.0.0.2:/data /data" in done.stdout


def test_tpu_vms_are_set_up_where_libtpu_lacks_a_flag(stand_ins, tmp_path):
    """What setup runs is run here: the share is mounted, and a line names what train leaves out."""
    if not (shutil.which("git") and (LAUNCH.parent / ".git").exists()):
        pytest.skip("not a git checkout")
    stand_ins("gcloud", f"""[ "$4" = scp ] && cp "$5" {tmp_path}/apt_jax.tar.gz
cd {tmp_path}
for a; do case "$a" in --command=*) bash -c "${{a#*=}}"; exit;; esac; done""")
    # apt_jax.parallel.flags where the installed libtpu knows all flags but one.
    python = tmp_path / "apt_jax/.venv/bin/python"
    stand_ins("python3", f"""[ "$3" = venv ] || exit 0
mkdir -p {python.parent}
cat > {python} <<'END'
#!/bin/sh
case "$*" in *--check*) echo "does not know xla_a" >&2; exit 2;; esac
case "$*" in *--known*) echo "left out xla_a" >&2; echo "--xla_b=1";; esac
END
chmod +x {python}""")
    stand_ins("mountpoint", "exit 1")
    stand_ins("sudo")
    done = tpu_vm(stand_ins, "setup", TPU_SHARE="10.0.0.2:/data")
    assert done.returncode == 0 and "left out xla_a" in done.stderr, done.stderr
    assert "sudo mount -o rw,hard 10.0.0.2:/data /data" in stand_ins.calls()


def test_tpu_vm_says_how(stand_ins):
    for arguments in ((), ("fly",), ("train",)):
        done = tpu_vm(stand_ins, *arguments)
        assert done.returncode == 2 and "launch/tpu_vm.sh create" in done.stderr


# -- apt-jax train ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "flags", "ends"), [
    ("preempted", ["--preempted-status", "75"], 75), ("preempted", [], 0),
    ("complete", ["--preempted-status", "75"], 0),
])
def test_train_tells_the_scheduler_that_steps_are_left(monkeypatch, status, flags, ends, tmp_path):
    import apt_jax.train.loop

    summary = {"status": status, "step": 3, "seconds": 1.0, "workdir": str(tmp_path)}
    monkeypatch.setattr(apt_jax.train.loop, "train", lambda *a, **k: summary)
    monkeypatch.setenv("APT_JAX_STATUS", str(tmp_path))
    config = str(LAUNCH.parent / "configs/demo_pretrain.py")
    assert main(["train", "--config", config, "--workdir", str(tmp_path), *flags]) == ends
    (told,) = tmp_path.glob(f"*-{os.getpid()}")
    assert told.read_text() == f"{ends}\n"


def test_a_process_that_leaves_before_its_first_update_tells_the_same(monkeypatch, tmp_path):
    import apt_jax.train.loop

    class Ended(Exception):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(apt_jax.train.loop, "train", lambda *a, leave, **k: leave())
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setenv("APT_JAX_STATUS", str(tmp_path))
    config = str(LAUNCH.parent / "configs/demo_pretrain.py")
    with pytest.raises(Ended, match="75"):
        main(["train", "--config", config, "--workdir", "run", "--preempted-status", "75"])
    (told,) = tmp_path.glob(f"*-{os.getpid()}")
    assert told.read_text() == "75\n"


def test_a_wrong_command_leaves_its_status_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("APT_JAX_STATUS", str(tmp_path))
    assert main(["train", "--confg", "x"]) == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["2\n"]
    monkeypatch.setenv("APT_JAX_STATUS", str(tmp_path / "none"))
    assert main(["train", "--confg", "x"]) == 2
    assert "cannot leave the status in" in capsys.readouterr().err
