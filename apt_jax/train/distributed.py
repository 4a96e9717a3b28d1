"""Several processes as one run: who the others are, who we are, what all agree on.

`start()` sets up `jax.distributed` when it is asked to or finds itself in a job of several
processes, and does nothing otherwise. It looks, in this order, at

    flags          --coordinator HOST:PORT --processes N --process I
    environment    APT_JAX_COORDINATOR, APT_JAX_PROCESSES, APT_JAX_PROCESS (from launch/local.py)
    Slurm          a step of srun with several tasks
    JobSet         JOBSET_NAME, REPLICATED_JOB_NAME, JOB_COMPLETION_INDEX, JOB_INDEX, with
                   APT_JAX_PROCESSES (and APT_JAX_PODS per job): launch/jobset_*.yaml set them
    jax            --distributed (or APT_JAX_DISTRIBUTED=1): jax finds out, e.g. on TPU VMs
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apt_jax.errors import UserError

JOBSET_PORT = 8476
SLURM_NO_STEP = 0xFFFFFFF0  # from here on steps are batch scripts, interactive shells and the like
JOIN_SECONDS = 900  # hosts of a cluster may still be fetching their image
SEEN_SECONDS = 30.0  # network storage shows a new file to other hosts after a while


@dataclasses.dataclass(frozen=True)
class Job:
    """One process of a job.

    Attributes:
      coordinator: "host:port" of process 0; None lets jax find everything.
      processes, process: how many, and which one this is.
      devices: the local devices of this process, None for all that it sees.
      source: where this was read, for the log.
    """

    coordinator: str | None
    processes: int = 1
    process: int = 0
    devices: tuple[int, ...] | None = None
    source: str = ""


def find_job(env: Mapping[str, str] | None = None, *, coordinator: str = "", processes: int = 0,
             process: int = -1, automatic: bool = False) -> Job | None:
    """The job this process belongs to, None for a process of its own.

    Args:
      env: the environment (default: os.environ).
      coordinator, processes, process: flags; "", 0 and -1 mean not given.
      automatic: ask jax.

    Raises:
      UserError: half of a description, or numbers that contradict each other.
    """
    env = os.environ if env is None else env
    given = {"--coordinator": bool(coordinator), "--processes": processes != 0,
             "--process": process != -1}
    if any(given.values()):
        return _described(given, coordinator, processes, process, "flags")
    names = ("APT_JAX_COORDINATOR", "APT_JAX_PROCESSES", "APT_JAX_PROCESS")
    if env.get(names[0]):
        return _described({name: name in env for name in names}, env[names[0]],
                          _number(env, names[1]), _number(env, names[2]), "environment")
    if _slurm_tasks(env) > 1:
        return _slurm(env)
    if "JOBSET_NAME" in env and "JOB_COMPLETION_INDEX" in env:
        return _jobset(env)
    if automatic or env.get("APT_JAX_DISTRIBUTED") == "1":
        return Job(None, source="jax")
    return None


def _described(given, coordinator, processes, process, source) -> Job | None:
    missing = [name for name, there in given.items() if not there]
    if missing:
        raise UserError(f"a job of several processes needs {', '.join(given)}; "
                        f"{' and '.join(missing)} not given")
    if not re.fullmatch(r"[^\s:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", coordinator):
        raise UserError(f"the coordinator {coordinator!r} must be HOST:PORT, e.g. node1:8476")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: the number must lie in 0 to "
                        f"{max(processes - 1, 0)}")
    return Job(coordinator, processes, process, None, source) if processes > 1 else None


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    try:
        return int(env.get(name, default))
    except ValueError:
        raise UserError(f"{name}={env[name]!r} is no number") from None


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """How many tasks the step of `srun` has that this process belongs to; 0 outside of one.

    The shells of sbatch and salloc have a task's variables too, but nobody beside them.
    """
    if "SLURM_PROCID" not in env or not env.get("SLURM_STEP_NODELIST") or (
            _number(env, "SLURM_STEP_ID") >= SLURM_NO_STEP):
        return 0
    return _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS"))


def _slurm(env: Mapping[str, str]) -> Job:
    """A task of `srun`. The first host of the step coordinates, at a port of the job's own."""
    hosts = env["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", hosts)
    host = first.group(1) + (first.group(2) or "")  # node[004-007,9] -> node004
    port = 61440 + _number(env, "SLURM_JOB_ID") % 4096
    # Several tasks on a node that all see all of its GPUs take one each.
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE") or "1")
    share = tasks and int(tasks.group()) > 1 and len(visible) > 1
    return Job(f"{host}:{port}", _slurm_tasks(env), _number(env, "SLURM_PROCID"),
               (_number(env, "SLURM_LOCALID"),) if share else None, "Slurm")


def _jobset(env: Mapping[str, str]) -> Job | None:
    """A pod of a JobSet; pod 0 of job 0 coordinates under its stable name."""
    name, job = env["JOBSET_NAME"], env.get("REPLICATED_JOB_NAME", "worker")
    processes = _number(env, "APT_JAX_PROCESSES", 1)
    index = _number(env, "JOB_COMPLETION_INDEX") + (
        _number(env, "JOB_INDEX") * _number(env, "APT_JAX_PODS", 1))
    return _described({}, f"{name}-{job}-0-0.{name}:{JOBSET_PORT}", processes, index, "JobSet")


def start(job: Job | None) -> None:
    """Joins the job: afterwards jax.devices() are all devices of all processes.

    Must run before anything asks jax for a device. Without the others jax aborts the process after
    JOIN_SECONDS, for its launcher to start it again. UserError for a job that jax does not take.
    """
    if job is None or jax.distributed.is_initialized():
        return
    try:
        if job.coordinator is None:
            jax.distributed.initialize(initialization_timeout=JOIN_SECONDS)
        else:
            jax.distributed.initialize(
                job.coordinator, job.processes, job.process,
                None if job.devices is None else list(job.devices),
                initialization_timeout=JOIN_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if job.coordinator is None:
            raise UserError(
                f"jax finds no other processes here ({reason}); on anything but TPU VMs set "
                "APT_JAX_COORDINATOR, APT_JAX_PROCESSES and APT_JAX_PROCESS, or give "
                "--coordinator HOST:PORT --processes N --process I") from None
        raise UserError(f"process {job.process} of {job.processes} cannot join the job at "
                        f"{job.coordinator} ({job.source}): {reason}") from None


def describe(mesh: Mesh) -> str:
    """One line on this process: host, devices and place in the mesh."""
    mine = [index for index, d in np.ndenumerate(mesh.devices)
            if d.process_index == jax.process_index()]
    place = []
    for axis, (name, size) in enumerate(mesh.shape.items()):
        at = sorted({index[axis] for index in mine})
        if size > 1:
            place.append(f"{name} {_spans(at)} of {size}")
    devices = jax.local_devices()
    return (f"process {jax.process_index()} of {jax.process_count()}: pid {os.getpid()} on "
            f"{socket.gethostname()}, {len(devices)} x {devices[0].device_kind} (ids "
            f"{_spans(sorted(d.id for d in devices))}), at {', '.join(place) or 'one device'}")


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def everywhere(value: int) -> list[int]:
    """The small number that each process gives, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    return [int(v) for v in multihost_utils.process_allgather(np.asarray(value, np.int32))]


def same_everywhere(numbers: list[int]) -> list[int]:
    """Those of `numbers` (int32, non-negative) that all processes give, in this one's order."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    lengths = everywhere(len(numbers))
    longest = max(lengths)
    if not min(lengths):
        return []
    padded = np.full(longest, -1, np.int32)
    padded[:len(numbers)] = numbers
    given = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, longest)
    return [n for n in numbers if all(n in row for row in given)]


def check_shared(folder: Path, latest: int) -> None:
    """UserError on all processes where `folder` is not the same one for all of them.

    Args:
      folder: made where no process sees a checkpoint in it.
      latest: the newest checkpoint that this process sees in it, -1 for none.
    """
    if jax.process_count() == 1:
        return
    found = everywhere(latest)
    blind = [p for p, step in enumerate(found) if step < 0]
    if blind and max(found) >= 0:
        raise UserError(f"{_named(blind)} no checkpoint in {folder} where the others see step "
                        f"{max(found)}; is the storage mounted there?")
    if not blind:
        return
    from jax.experimental import multihost_utils

    # Nobody has been here: process 0 leaves something for the others to find.
    number = int(multihost_utils.broadcast_one_to_all(np.asarray(os.getpid(), np.int32)))
    mark = folder / f".seen_by_all.{number}.tmp"
    if first := jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    everywhere(0)  # until it is there
    end = time.monotonic() + SEEN_SECONDS
    while not (there := mark.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [p for p, sees in enumerate(everywhere(int(there))) if not sees]
    if first:
        mark.unlink()
    if blind:
        raise UserError(f"{_named(blind)} nothing of what process 0 writes into {folder}; is the "
                        "storage mounted there?")


def _named(processes: list[int]) -> str:
    """The subject and verb of what they see."""
    return (f"process {processes[0]} sees" if len(processes) == 1 else
            f"the processes {_spans(processes)} see")


def agree(value: Any) -> None:
    """Raises UserError unless all processes hold the same JSON-able value (their configuration)."""
    if jax.process_count() == 1:
        return
    import hashlib
    import json

    from jax.experimental import multihost_utils

    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    mine = np.frombuffer(digest[:8], np.uint32).astype(np.int32)
    first = multihost_utils.broadcast_one_to_all(mine)
    same = multihost_utils.process_allgather(np.asarray(np.array_equal(first, mine)))
    if not np.all(same):
        others = _spans([int(p) for p in np.flatnonzero(~same)])
        raise UserError(f"the processes {others} were started with another configuration than "
                        "process 0; start all with the same command")
