"""A preparation spread over a Ray cluster (an optional extra): one worker a GPU, or a node.

Files are looked at and shards written by actors; this process only hands out work, notes finished
shards and writes the manifest. `source`, `out` and the checkpoint folders must be the same paths on
all nodes (a shared file system). A shard whose worker dies is handed out again, and since a shard
appears whole under one name or not at all, no record is lost or doubled.
"""

from __future__ import annotations

import collections
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from apt_jax.data.manifest import Prompt
from apt_jax.data.sources import Item
from apt_jax.data.worker import Job, Worker
from apt_jax.errors import UserError

log = logging.getLogger("apt_jax")

_ATTEMPTS = 3  # workers that one piece of work may cost
_PATIENCE = 60.0  # seconds without news before a word about it
_LOOKS = 64  # files that a worker looks at in one go
_STORE_BYTES = 2**28  # of a cluster started here: only names and notes go through it


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, worker: tuple, threads: int):
        self._worker = Worker(*worker, threads=threads)

    def ready(self) -> None:
        """Answers when the worker runs."""

    def probe(self, items: Sequence[Item]) -> list[dict]:
        return list(self._worker.probe(items))

    def write(self, job: Job) -> dict:
        return self._worker.write(job)

    def prompts(self, captions: Sequence[str]) -> list[Prompt]:
        return self._worker.prompts(captions)


class RayEngine:
    """Workers as Ray actors.

    Args:
      worker: the arguments of `Worker`.
      threads: decoding threads of each.
      workers: how many; 0 is one for each GPU, or for each node where there is no GPU.
      address: of a running cluster, or "auto"; "" starts one on this machine.

    UserError where Ray is not installed, cannot be reached, or is too small.
    """

    def __init__(self, worker: tuple, threads: int, workers: int, address: str):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        try:
            import ray
        except ImportError:
            raise UserError("--engine ray needs Ray; pip install 'apt_jax[ray]'") from None
        self._ray = ray
        source, out, *rest = worker
        # Not resolved: the items of an archive that is a link carry the link's name.
        self._args = (pathlib.Path(source).absolute(), pathlib.Path(out).absolute(), *rest)
        self._threads = threads
        self._started = not ray.is_initialized()
        if self._started:
            _connect(ray, address, workers)
        have = ray.cluster_resources()
        cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
        count = workers or gpus or sum(n["Alive"] for n in ray.nodes())
        if count > cpus or (gpus and count > gpus):
            self.close()
            what = f"{cpus} CPUs" + (f" and {gpus} GPUs" if gpus else "")
            raise UserError(f"--workers {count} do not fit the Ray cluster's {what}; ask for "
                            f"{min(cpus, gpus or cpus)}")
        self._remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0,
                                  scheduling_strategy="SPREAD")(_Actor)
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}  # reference to "it runs" -> actor
        self._failed = 0  # starts in a row
        for _ in range(count):
            self._start()

    def probe(self, items: Sequence[Item]) -> Iterator[dict]:
        """Rows in the order in which they come."""
        parts = [items[i : i + _LOOKS] for i in range(0, len(items), _LOOKS)]
        for _, rows in self._hand_out("probe", parts, lambda part: part[0].name):
            yield from rows

    def write(self, jobs: Iterable[Job], tick: Callable[[int], Any]) -> Iterator[tuple]:
        """Shards in the order in which they are finished."""
        for job, done in self._hand_out("write", list(jobs), lambda job: job.name):
            tick(len(job.plans))
            yield job, done

    def prompts(self, captions: Sequence[str]) -> list[Prompt]:
        ((_, found),) = self._hand_out("prompts", [captions], lambda _: "the fixed prompts")
        return found

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started here."""
        for actor in [*self._idle, *self._starting.values()] if hasattr(self, "_idle") else ():
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def _start(self) -> None:
        """One more worker; it gets work when it runs, which may need a node to come."""
        actor = self._remote.remote(self._args, self._threads)
        self._starting[actor.ready.remote()] = actor

    def _hand_out(self, method: str, work: list, label: Callable[[Any], str]) -> Iterator[tuple]:
        """Yields (piece, result) as they come; a piece whose worker dies is handed out again."""
        left = collections.deque(enumerate(work))
        attempts: collections.Counter = collections.Counter()
        running: dict[Any, tuple] = {}
        try:
            while left or running:
                while left and self._idle:
                    actor, (number, piece) = self._idle.pop(), left.popleft()
                    running[getattr(actor, method).remote(piece)] = (actor, number, piece)
                found, _ = self._ray.wait([*running, *self._starting], timeout=_PATIENCE)
                if not found:
                    log.warning("waiting for Ray: %d workers at work, %d that it has not started",
                                len(running), len(self._starting))
                    continue
                if found[0] in self._starting:
                    self._started_or_failed(found[0])
                    continue
                actor, number, piece = running.pop(found[0])
                try:
                    result = self._ray.get(found[0])
                except self._ray.exceptions.RayTaskError as error:
                    self._idle.append(actor)
                    raise getattr(error, "cause", None) or error from None
                except self._ray.exceptions.RayError as error:  # the worker or its node is gone
                    self._ray.kill(actor)
                    self._start()
                    left.appendleft((number, piece))
                    attempts[number] += 1
                    if attempts[number] == _ATTEMPTS:
                        raise UserError(
                            f"{_ATTEMPTS} Ray workers ended at {label(piece)}, the last with: "
                            f"{_line(error)}; mend it and repeat the command") from None
                    log.warning("a Ray worker ended, its work is given to another: %s",
                                _line(error))
                    continue
                self._idle.append(actor)
                yield piece, result
        finally:
            self._idle += [actor for actor, _, _ in running.values()]

    def _started_or_failed(self, reference: Any) -> None:
        """Settle a start: the worker is idle, or another one is started. UserError after three."""
        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            self._failed += 1
            if self._failed == _ATTEMPTS:
                raise UserError(f"no Ray worker can be started: {_line(error)}; the checkpoint and "
                                "this package must be on every node") from None
            self._start()
            return
        self._failed = 0
        self._idle.append(actor)


def _knock(address: str) -> None:
    """OSError at once where nothing listens: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[-300:]


def _connect(ray: Any, address: str, workers: int) -> None:
    """Join the cluster, or start one with as many CPUs as workers (at least the machine's)."""
    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        if address:
            _knock(address)
            ray.init(address=address, **quiet)
        else:
            cpus = max(workers, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False,
                     object_store_memory=_STORE_BYTES, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"no Ray cluster at {address or 'this machine'} ({line}); start one with "
                        "'ray start --head', or leave --ray-address out") from None
