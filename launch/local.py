#!/usr/bin/env python3
"""Runs one command as several processes of one job on this machine, and restarts it when it breaks.

    python launch/local.py --processes 4 -- apt-jax train --config FILE --workdir DIR
    python launch/local.py --processes 2 --devices 4 --cpu --restarts 3 -- apt-jax train ...

Every process gets APT_JAX_COORDINATOR, APT_JAX_PROCESSES and APT_JAX_PROCESS, from which
`apt-jax train` finds the others. Its lines are shown with its number before them. When one process
fails, the others, which wait for it in vain, are stopped and all are started again, up to
--restarts times: training goes on from the last checkpoint. SIGTERM, or Ctrl-C, makes all processes
save the same step and leave; a second one ends them at once. Needs no package beside Python's own.

GPUs: with --gpus each process gets its share of CUDA_VISIBLE_DEVICES (or of --gpus N of them).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

POLL = 0.1
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
                        help="GPUs of this machine, shared out evenly (default: all to every "
                             "process)")
    parser.add_argument("command", nargs="+", help="after --: the command")
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices start at 1")
    if args.gpus % args.processes:
        parser.error(f"--gpus {args.gpus} cannot be shared out to {args.processes} processes")
    return args


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(args: argparse.Namespace, process: int, port: int) -> dict[str, str]:
    """What process `process` of the job sees."""
    env = dict(os.environ, APT_JAX_COORDINATOR=f"127.0.0.1:{port}",
               APT_JAX_PROCESSES=str(args.processes), APT_JAX_PROCESS=str(process))
    if args.cpu:
        flags = [flag for flag in env.get("XLA_FLAGS", "").split()
                 if "host_platform_device_count" not in flag]
        env["XLA_FLAGS"] = " ".join(
            [*flags, f"--xla_force_host_platform_device_count={args.devices}"])
        env["JAX_PLATFORMS"] = "cpu"
    else:  # processes that see the same GPUs share their memory
        sharing = 1 if args.gpus else args.processes
        env.setdefault(MEMORY, f"{MEM_FRACTION / sharing:g}")
    if args.gpus:
        every = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        every = every[:args.gpus] or list(map(str, range(args.gpus)))
        share = len(every) // args.processes
        env["CUDA_VISIBLE_DEVICES"] = ",".join(every[process * share:(process + 1) * share])
    return env


class Job:
    """The processes of one attempt."""

    def __init__(self, args: argparse.Namespace):
        port = free_port()
        self.processes = [
            subprocess.Popen(args.command, env=environment(args, i, port), text=True,
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

    def wait(self) -> int:
        """0 when all have ended well; the first failure's status, once the others are stopped."""
        while True:
            states = [process.poll() for process in self.processes]
            failed = [state for state in states if state]
            if failed or None not in states:
                break
            time.sleep(POLL)
        if failed:
            # SIGTERM would make a healthy run save, but these wait for a process that is gone.
            self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for reader in self.readers:
            reader.join(timeout=5)
        return failed[0] if failed else 0


def show(number: int, process: subprocess.Popen) -> None:
    """Copies a process's lines to ours, its number before them."""
    for line in process.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def main() -> int:
    args = arguments()
    asked: list[int] = []
    job: Job | None = None

    def pass_on(number, _frame):
        asked.append(number)
        if job is not None:
            job.send(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for attempt in range(args.restarts + 1):
        job = Job(args)
        if asked:  # it came while the job was being started
            job.send(signal.SIGTERM)
        status = job.wait()
        if status == 0 or asked:
            return status
        left = args.restarts - attempt
        print(f"launch/local.py: a process ended with status {status}; "
              f"{f'starting all again, {left - 1} more times at most' if left else 'giving up'}",
              file=sys.stderr, flush=True)
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
