"""Where the workers of a preparation run: here, in this process, or on Ray (`ray_engine`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from apt_jax.data.manifest import Prompt
from apt_jax.data.sources import Item
from apt_jax.data.worker import Job, Worker
from apt_jax.errors import UserError

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Runs a worker's methods somewhere. Results may come in any order, each exactly once."""

    def probe(self, items: Sequence[Item]) -> Iterator[dict]: ...

    def write(self, jobs: Iterable[Job], tick: Callable[[int], Any]) -> Iterator[tuple]:
        """Yields (job, what `Worker.write` returned); tick counts the files done."""

    def prompts(self, captions: Sequence[str]) -> list[Prompt]: ...

    def close(self) -> None: ...


class LocalEngine:
    """One worker in this process: decoding on threads, encoding on all of its devices."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self.probe, self.prompts, self.close = worker.probe, worker.prompts, worker.close

    def write(self, jobs: Iterable[Job], tick: Callable[[int], Any]) -> Iterator[tuple]:
        for job in jobs:
            yield job, self._worker.write(job, lambda: tick(1))


def open_engine(name: str, *worker: Any, threads: int, workers: int, address: str) -> Engine:
    """The engine of a name; `worker` are the arguments of `Worker`. UserError for another name."""
    if workers < 0:
        raise UserError(f"--workers {workers} is fewer than none; give how many, or leave it out")
    if name == "local":
        return LocalEngine(Worker(*worker, threads=threads))
    if name == "ray":
        from apt_jax.data.ray_engine import RayEngine

        return RayEngine(worker, threads=threads, workers=workers, address=address)
    raise UserError(f"--engine {name!r} is not one of: {', '.join(ENGINES)}")
