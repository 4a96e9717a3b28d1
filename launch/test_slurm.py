#!/usr/bin/env python3
"""Submits launch/slurm.sbatch to a real Slurm: a cluster of one machine that this script starts.

    make test-slurm        or: .venv/bin/python launch/test_slurm.py, as root

Installs Debian's slurm-wlm and munge where they are missing, which needs root, starts munged,
slurmctld and slurmd with keys, ports and files of their own in a scratch folder, and stops them at
the end; a Slurm that runs already is left alone. The sbatch file goes in as it is but for its size:
two tasks on this machine's CPU. It shows that

    a wrong command ends the job, also where one task is slow to find out,
    20 steps over two tasks are complete and agree with one process,
    a run that loses a task to SIGKILL, then runs out of time, ends with the bits of a calm one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZE = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1",
        "--time=01:00:00"]
# Small, and with steps so small that rounding does not grow.
TINY = ["--config", "configs/demo_pretrain.py", *(f"--config.{field}" for field in (
    "model.depth=1", "data.frames=1", "train.batch_size=4", "train.clip_batch_size=0",
    "train.accumulate=1", "train.log_every=1", "train.checkpoint_every=10",
    "optimizer.learning_rate=1e-5", "optimizer.warmup_steps=0", "mesh.fsdp=-1"))]
SECONDS = 1200
CONF = """\
ClusterName=apt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={scratch}/munge/socket
CredType=cred/munge
StateSaveLocation={scratch}/state
SlurmdSpoolDir={scratch}/spool
SlurmctldPidFile={scratch}/slurmctld.pid
SlurmdPidFile={scratch}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES State=UP OverSubscribe=YES
"""


def say(text: str) -> None:
    print(f"test_slurm: {text}", flush=True)


def run(*command: object) -> str:
    """A command's output; leaves with its complaint where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"test_slurm: {' '.join(map(str, command))}: {done.stderr or done.stdout}")
    return done.stdout


def install() -> None:
    if os.geteuid():
        raise SystemExit("test_slurm: only root may install Slurm and start its daemons")
    if all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return
    if not shutil.which("apt-get"):
        raise SystemExit("test_slurm: needs slurm-wlm and munge, and apt-get to install them")
    say("installing slurm-wlm and munge")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run("apt-get", "update", "-q")
    run("apt-get", "install", "-y", "-q", "--no-install-recommends", "slurm-wlm", "munge")


class Cluster:
    """The daemons, while `with` lasts."""

    def __init__(self, scratch: Path):
        self.scratch, self.host = scratch, socket.gethostname().split(".")[0]
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        for name in ("munge", "state", "spool"):
            (self.scratch / name).mkdir(mode=0o700)
        self.scratch.chmod(0o755)
        (self.scratch / "munge").chmod(0o755)  # the socket is for everyone
        conf = self.scratch / "slurm.conf"
        conf.write_text(CONF.format(host=self.host, scratch=self.scratch, cpus=os.cpu_count(),
                                    ports=free_ports(2)))
        os.environ["SLURM_CONF"] = str(conf)
        munge = self.scratch / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        try:
            self.start("munged", "--foreground", "--force", f"--socket={munge}/socket",
                       f"--key-file={munge}/key", f"--pid-file={munge}/pid",
                       f"--seed-file={munge}/seed", f"--log-file={munge}/log")
            wait_for(lambda: (munge / "socket").exists(), "munged does not start")
            self.start("slurmctld", "-D")
            self.start("slurmd", "-D", "-N", self.host)
            wait_for(lambda: "idle" in subprocess.run(
                ["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout,
                "the cluster does not come up", self)
        except BaseException:
            self.__exit__()
            raise
        say(f"{run('slurmctld', '-V').strip()} is up: {run('sinfo', '-h').strip()}")
        return self

    def start(self, *command: str) -> None:
        log = (self.scratch / f"{command[0]}.log").open("w")
        self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log))

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}"
                         for path in sorted(self.scratch.glob("*.log")))

    def __exit__(self, *_: object) -> None:
        for job in subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True,
                                  text=True).stdout.split():
            subprocess.run(["scancel", "--signal=KILL", "--full", job], capture_output=True)
            subprocess.run(["scancel", job], capture_output=True)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        say("the daemons are stopped")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(done, trouble: str, cluster: Cluster | None = None, job: Job | None = None,
             pause: float = 1.0) -> None:
    """Until done() is true; leaves with `trouble` when it is late or the job has failed."""
    end, look = time.monotonic() + SECONDS, 0.0
    while not done():
        failed = False
        if job is not None and time.monotonic() > look:
            failed, look = job.failed(), time.monotonic() + 2
        if failed or time.monotonic() > end:
            raise SystemExit(f"test_slurm: {trouble}\n" + (job.log() if job else "")
                             + (cluster.logs() if cluster else ""))
        time.sleep(pause)


class Job:
    """launch/slurm.sbatch, submitted."""

    def __init__(self, folder: Path, name: str, steps: int, *more: str):
        self.workdir, self.output, self.steps = folder / name, folder / f"{name}.log", steps
        env = {**os.environ, "APT_JAX_VENV": sys.prefix, "JAX_PLATFORMS": "cpu"}
        command = ["sbatch", "--parsable", *SIZE, f"--output={self.output}",
                   "launch/slurm.sbatch", *training(self.workdir, steps), *more]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"test_slurm: sbatch: {done.stderr}")
        self.id = done.stdout.strip()
        say(f"job {self.id}: sbatch {' '.join(SIZE)} launch/slurm.sbatch ... --workdir {name} "
            f"--config.train.steps={steps}")

    def state(self) -> str:
        return re.search(r"JobState=(\w+)", run("scontrol", "show", "job", self.id)).group(1)

    def failed(self) -> bool:
        return self.state() in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def step(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step, f"job {self.id} does not get to step {step}",
                 job=self, pause=0.02)

    def wait_for_line(self, text: str) -> None:
        """Slurm lets a job that is queued again rest for two minutes; we do not wait so long."""
        def said():
            if self.state() == "PENDING":
                subprocess.run(["scontrol", "update", f"JobId={self.id}", "StartTime=now"],
                               capture_output=True)
            return text in self.log()
        wait_for(said, f"job {self.id} never says {text!r}", job=self)

    def end(self) -> None:
        wait_for(lambda: self.state() == "COMPLETED", f"job {self.id} has failed", job=self)
        for line in self.log().splitlines():
            if re.match(r"slurm.sbatch: |demo_pretrain: ", line):
                print(f"    {line}", flush=True)
        if self.step() != self.steps:
            raise SystemExit(f"test_slurm: {self.step()} of {self.steps} steps are logged")

    def pids(self) -> dict[int, int]:
        """Process ids of the newest attempt, by process."""
        return {int(number): int(pid) for number, pid in re.findall(
            r"process (\d+) of 2: pid (\d+) on", self.log())}


def training(workdir: Path, steps: int) -> list[str]:
    return [*TINY, f"--config.train.steps={steps}", "--workdir", str(workdir), "--quiet"]


def difference(a: Path, b: Path) -> tuple[float, bool]:
    """Of two runs' weights: |a - b| / |b| over all parameters, and whether all bits are equal."""
    import numpy as np

    from apt_jax.weights import flatten, load_generator

    total = norm = 0.0
    same = True
    for which in ("ema", "raw"):
        one, two = (flatten(load_generator(run, which)[1]) for run in (a, b))
        assert one.keys() == two.keys()
        for name in one:
            x, y = (np.asarray(tree[name], np.float64) for tree in (one, two))
            total, norm = total + np.sum((x - y) ** 2), norm + np.sum(y ** 2)
            same &= bool(np.array_equal(x, y))
    return float(np.sqrt(total / norm)), same


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def knows_a_wrong_command(folder: Path) -> None:
    """Task 1 is still waiting when task 0 leaves with 2: srun kills it and tells 143."""
    config = folder / "wrong.py"
    config.write_text(
        "import os, time\nfrom apt_jax.config import base_config\n"
        "def get_config():\n    time.sleep(60 * int(os.environ['SLURM_PROCID']))\n"
        "    config = base_config()\n    config.stage = 'none'\n    return config\n")
    job = Job(folder, "wrong", 20, "--config", str(config))
    wait_for(lambda: job.state() not in ("PENDING", "RUNNING", "COMPLETING"),
             f"job {job.id} does not end")
    said = [line for line in job.log().splitlines() if re.match(r"slurm.sbatch: |apt-jax: ", line)]
    print("\n".join(f"    {line}" for line in said), flush=True)
    if "ExitCode=2:0" not in run("scontrol", "show", "job", job.id) or (
            "not starting again" not in said[-1]):
        raise SystemExit(f"test_slurm: the job was not ended with status 2\n{job.log()}")


def agrees_with_one_process(folder: Path) -> None:
    job = Job(folder, "two_tasks", 20)
    job.end()
    say("the same in one process")
    subprocess.run([sys.executable, "-m", "apt_jax", "train", *training(folder / "one", 20)],
                   cwd=ROOT, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    found, _ = difference(job.workdir, folder / "one")
    pairs = zip(losses(job.workdir), losses(folder / "one"), strict=True)
    worst = max(abs(a - b) / b for a, b in pairs)
    say(f"20 steps over two tasks, against one process: weights differ by {found:.1e} of their "
        f"norm, losses by {worst:.1e} at most")
    if not (found < 1e-5 and worst < 1e-5):
        raise SystemExit("test_slurm: they differ")


def survives(folder: Path, steps: int = 60) -> None:
    calm = Job(folder, "calm", steps)
    calm.end()
    job = Job(folder, "disturbed", steps)
    job.wait_for_step(steps // 4)
    say(f"SIGKILL to task 1 after step {job.step()}")
    os.kill(job.pids()[1], signal.SIGKILL)
    job.wait_for_line("queued again 0 times, attempt 1")
    job.wait_for_step(steps // 2)
    say(f"time is up (SIGUSR1, as --signal sends it) after step {job.step()}")
    run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_line("queued again 1 times, attempt 0")
    job.end()
    if "saved step" not in job.log():
        raise SystemExit("test_slurm: the run ended before the signal came; try again")
    _, same = difference(job.workdir, calm.workdir)
    say(f"killed and stopped once: {'the same bits as' if same else 'NOT equal to'} the calm run")
    if not same:
        raise SystemExit("test_slurm: they differ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the disturbed run")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stops the daemons
    install()
    with tempfile.TemporaryDirectory(prefix="apt_slurm_") as scratch, Cluster(Path(scratch)):
        folder = Path(scratch) / "runs"
        folder.mkdir()
        knows_a_wrong_command(folder)
        agrees_with_one_process(folder)
        if not args.quick:
            survives(folder)
    say("all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
