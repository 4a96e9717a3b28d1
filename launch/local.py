#!/usr/bin/env python3
"""Runs one command as several processes of one job on this machine, and restarts it when it breaks.

    python launch/local.py --processes 4 -- apt-jax train --config FILE --workdir DIR
    python launch/local.py --processes 2 --devices 4 --cpu --restarts 3 -- apt-jax train ...

Every process gets APT_JAX_COORDINATOR, APT_JAX_PROCESSES and APT_JAX_PROCESS, from which
`apt-jax train` finds the others. Its lines are shown with its number before them. When one process
fails, the others, which wait for it in vain, are stopped and all are started again, up to
--restarts times: training goes on from the last checkpoint. Status 2 (the command is wrong) and 75
(saved after a signal, --preempted-status 75) are passed on, without another start. SIGTERM, or
Ctrl-C, makes all processes save the same step and leave; a second one ends them at once.

GPUs: each process gets its share of those in CUDA_VISIBLE_DEVICES, or of the machine's; of the first
N of them with --gpus N. The processes get XLA's flags for GPUs, before what XLA_FLAGS holds, and
nearly all of their memory.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

POLL = 0.1
WRONG, SAVED = 2, 75  # what apt-jax train ends with, see docs/launch.md
GRACE = 5.0  # seconds
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
MEM_FRACTION = 0.94  # of a GPU's memory: what apt-jax plan counts on; jax takes 0.75 by itself


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("--restarts", type=int, default=0, metavar="N",
                        help="start anew so often after a failure (default: 0)")
    parser.add_argument("--cpu", action="store_true", help="run on CPUs (JAX_PLATFORMS=cpu)")
    parser.add_argument("--devices", type=int, default=1, metavar="N",
                        help="with --cpu: virtual devices of each process (default: 1)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N",
                        help="GPUs of this machine, shared out evenly (default: all)")
    parser.add_argument("command", nargs="+", help="after --: the command")
    args = parser.parse_args()
    for name, least in (("processes", 1), ("devices", 1), ("restarts", 0), ("gpus", 0)):
        if (number := getattr(args, name)) < least:
            wrong(f"--{name} {number}; give {least} or more")
    if not args.gpus and args.processes > 1:
        # Two processes on one GPU cannot talk: NCCL takes it for a mistake.
        args.gpus = gpus_here(args)
    if args.gpus % args.processes:
        wrong(f"{args.gpus} GPUs cannot be shared out to {args.processes} processes; give another "
              "--gpus or --processes, or --cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and len(split(visible)) < args.gpus:
        wrong(f"--gpus {args.gpus}, but CUDA_VISIBLE_DEVICES={visible} names "
              f"{len(split(visible))}; give fewer, or unset it")
    if shutil.which(args.command[0]) is None:
        wrong(f"there is no command {args.command[0]!r} that can be run; check its name, or "
              "activate the environment it is in")
    return args


def wrong(text: str) -> NoReturn:
    """Ends with one line."""
    print(f"launch/local.py: {text}", file=sys.stderr)
    raise SystemExit(WRONG)


def split(devices: str) -> list[str]:
    return [device for device in devices.split(",") if device]


def gpus_here(args: argparse.Namespace) -> int:
    """How many GPUs the processes may use."""
    if args.cpu or os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(glob.glob("/dev/nvidia[0-9]*") if visible is None else split(visible))


def gpu_flags(args: argparse.Namespace) -> str:
    """XLA's flags for GPUs that the installed one knows; "" where there are no GPUs to use."""
    if args.cpu or not (args.gpus or gpus_here(args)):
        return ""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from apt_jax.parallel.flags.check import known_value

    return known_value("gpu", 1, lambda line: print(f"launch/local.py: {line}", file=sys.stderr))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(args: argparse.Namespace, process: int, port: int, flags: str) -> dict[str, str]:
    """What process `process` of the job sees; `flags`: of XLA for GPUs."""
    env = dict(os.environ, APT_JAX_COORDINATOR=f"127.0.0.1:{port}",
               APT_JAX_PROCESSES=str(args.processes), APT_JAX_PROCESS=str(process))
    if args.cpu:
        others = [flag for flag in env.get("XLA_FLAGS", "").split()
                  if "host_platform_device_count" not in flag]
        env["XLA_FLAGS"] = " ".join(
            [*others, f"--xla_force_host_platform_device_count={args.devices}"])
        env["JAX_PLATFORMS"] = "cpu"
    else:
        env.setdefault(MEMORY, f"{MEM_FRACTION:g}")
    if flags:  # the user's come last and win
        env["XLA_FLAGS"] = f"{flags} {env.get('XLA_FLAGS', '')}".strip()
    if args.gpus:
        every = split(env.get("CUDA_VISIBLE_DEVICES", ""))[:args.gpus]
        every = every or list(map(str, range(args.gpus)))
        share = len(every) // args.processes
        env["CUDA_VISIBLE_DEVICES"] = ",".join(every[process * share:(process + 1) * share])
    return env


class Job:
    """The processes of one attempt."""

    def __init__(self, args: argparse.Namespace, flags: str):
        port = free_port()
        self.processes = [
            subprocess.Popen(args.command, env=environment(args, i, port, flags), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
                             start_new_session=True)  # a terminal's Ctrl-C comes through us, once
            for i in range(args.processes)]
        self.readers = [threading.Thread(target=show, args=(i, p), daemon=True)
                        for i, p in enumerate(self.processes)]
        for reader in self.readers:
            reader.start()

    def send(self, number: int) -> None:
        """A signal to every process that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def ended_within(self, seconds: float) -> None:
        """Waits until all have ended, but no longer than that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(p.poll() is None for p in self.processes):
            time.sleep(POLL)

    def wait(self) -> int:
        """The status of the whole: 0, SAVED, or a failure, once the others are stopped."""
        while True:
            states = [process.poll() for process in self.processes]
            failed = [state for state in states if state not in (None, 0, SAVED)]
            if failed or None not in states:
                break
            time.sleep(POLL)
        if WRONG in failed:
            # What is wrong with the command all of them find, and one of them says it: not
            # necessarily the one that ends first.
            self.ended_within(GRACE)
        if failed:
            # SIGTERM would make a healthy run save, but these wait for a process that is gone.
            self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for reader in self.readers:
            reader.join(timeout=5)
        return verdict(failed or states)


def verdict(states: list[int]) -> int:
    """The status of an attempt whose processes ended so; signals become 128 + their number."""
    if WRONG in states:  # it says why; others may have been aborted because of it
        return WRONG
    first = next((state for state in states if state not in (0, SAVED)), max(states))
    return first if first >= 0 else 128 - first


def show(number: int, process: subprocess.Popen) -> None:
    """Copies a process's lines to ours, its number before them."""
    for line in process.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def main() -> int:
    args = arguments()
    flags = gpu_flags(args)
    asked: list[int] = []
    job: Job | None = None

    def pass_on(number, _frame):
        asked.append(number)
        if job is not None:
            job.send(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for attempt in range(args.restarts + 1):
        job = Job(args, flags)
        if asked:  # it came while the job was being started
            job.send(signal.SIGTERM)
        status = job.wait()
        if status in (0, SAVED) or asked:
            return status
        if status == WRONG:
            print("launch/local.py: the command is wrong, see above; not starting again",
                  file=sys.stderr, flush=True)
            return status
        left = args.restarts - attempt
        print(f"launch/local.py: a process ended with status {status}; "
              f"{f'starting all again, {left - 1} more times at most' if left else 'giving up'}",
              file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
