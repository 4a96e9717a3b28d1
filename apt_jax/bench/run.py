"""The rows of each bench: its cases, then what stands beside them, each kept as soon as it is there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apt_jax.bench import block, pipeline, programs, torch_peers
from apt_jax.bench.case import Case, compile_case, line, time_case
from apt_jax.bench.cases import INFERENCE_ONLY, parts_of_backend
from apt_jax.bench.device_less import Compiled
from apt_jax.bench.profile import folder_of
from apt_jax.bench.report import Results, attempt, config_digest, row_name
from apt_jax.bench.rows import keep, make_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
      what: block, forward, train, vae or pipeline.
      config_of: attention's backend -> a fresh config.
      devices: to compile or run on.
      backends, weights, parts, steps, decoders: the choices of each; not every bench reads all.
      overrides: of the config, for the rows' names.
      seconds: to time each row for. peers: whether PyTorch runs beside it.
      as_trained: train times the config's own batch and accumulation, without PyTorch's step of one
        sample.
      profile: a folder for traces of the rows, "" for none.
      most: rows to time that were never tried, 0 for all (`rows.make_rows`).
    """

    what: str
    config_of: Callable[[str], Any]
    devices: Sequence[Any]
    backends: Sequence[str] = ("auto",)
    weights: Sequence[str] = ("bfloat16",)
    parts: Sequence[str] = block.PARTS
    steps: Sequence[str] = programs.STEPS
    decoders: Sequence[str] = tuple(pipeline.DECODERS)
    overrides: Sequence[str] = ()
    seconds: float = 5.0
    peers: bool = True
    as_trained: bool = False
    profile: str = ""
    most: int = 0

    def config(self, backend: str, weights: str = "") -> Any:
        """A config with this attention and, for benches that train, these products in G and D."""
        config = self.config_of(backend)
        if weights:
            matmul = "fp8" if weights == "fp8" else "dtype"
            config.model.matmul = config.discriminator.matmul = matmul
        return config


def cases(plan: Plan) -> Iterator[Case]:
    """The programs of a plan, one at a time, each with the digest of its config."""
    if plan.what == "vae":
        config = plan.config("auto")
        for decoder in plan.decoders:
            yield from _of(config, [pipeline.decode_case(config, plan.devices[0], decoder,
                                                         overrides=plan.overrides)])
        return
    for backend in plan.backends:
        if plan.what == "train" and backend in INFERENCE_ONLY:
            continue
        for weights in plan.weights:
            in_network = plan.what in ("train", "block")  # the others say it of stored weights
            config = plan.config(backend, weights if in_network else "")
            yield from _of(config, _cases(plan, config, backend, weights))


def _of(config: Any, made: Iterable[Case]) -> Iterator[Case]:
    digest = config_digest(config)
    return (dataclasses.replace(case, config=digest) for case in made)


def _cases(plan: Plan, config: Any, backend: str, weights: str) -> Iterator[Case]:
    first, overrides = plan.devices[0], plan.overrides
    if plan.what == "forward":
        yield programs.forward_case(config, plan.devices, weights, overrides)
    elif plan.what == "train":
        yield from (case for case in programs.train_cases(config, plan.devices, overrides,
                                                          plan.as_trained)
                    if case.part in plan.steps)
    elif plan.what == "block":
        yield from (block.block_case(config, first, part, overrides) for part in plan.parts
                    if part in parts_of_backend(backend))
    else:
        yield from pipeline.stages(config, first, weights, plan.decoders[0],
                                   overrides=overrides).values()


def compile_all(plan: Plan, label: str, results: Results) -> list[dict[str, Any]]:
    """Compiles every case for devices that are not there; the rows, those that were there too."""
    rows = []
    for case in cases(plan):
        if not results.has(case.name, case.config):
            row = compile_case(case, plan.devices[0], label)
            results.add(case.name, {**dataclasses.asdict(row), "passes": row.passes}, case.config)
        rows.append(results.rows[case.name])
    return rows


def as_compiled(row: dict[str, Any]) -> Compiled:
    """A kept row of `compile_all`."""
    names = {f.name for f in dataclasses.fields(Compiled)}
    return Compiled(**{name: value for name, value in row.items() if name in names})


def time_all(plan: Plan, device: str, results: Results, tell: Callable[[str], None] = print
             ) -> int:
    """Times PyTorch's peer (first: jax keeps the memory that it has taken), then every case.

    Returns how many rows failed: not those that a kernel or a missing package refuses. Raises
    `rows.DeviceLost` and `rows.Enough`.
    """
    todo = ((name, config, functools.partial(attempt, make))
            for name, config, make in _todo(plan, device))
    return make_rows(todo, results, lambda name, row: tell(line(name, row)), plan.most)


def _todo(plan: Plan, device: str) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(name, digest of the config, what times it) of every row."""
    if plan.peers and not plan.as_trained:
        digest = config_digest(plan.config("auto"))
        yield from ((name, digest, make) for name, make in _peers(plan, device))
    if plan.what != "pipeline":
        for case in cases(plan):
            yield case.name, case.config, functools.partial(_timed, plan, case, device)
        return
    for backend in plan.backends:
        for weights in plan.weights:
            config = plan.config(backend)
            name = row_name(config.name, "pipeline", weights, backend, plan.decoders[0],
                            overrides=plan.overrides)
            yield name, config_digest(config), functools.partial(
                _whole, plan, config, weights, folder_of(plan.profile, name))


def _whole(plan: Plan, config: Any, weights: str, trace: Path | None) -> dict[str, Any]:
    stages = pipeline.stages(config, plan.devices[0], weights, plan.decoders[0])
    return pipeline.time_pipeline(stages, plan.seconds, trace=trace)


def _timed(plan: Plan, case: Case, device: str) -> dict[str, Any]:
    row = time_case(case, device, plan.seconds, folder_of(plan.profile, case.name))
    if plan.what == "block":
        keep(row)
        config = plan.config(case.backend, "fp8" if case.fp8 else "bfloat16")
        row |= block.parts_of(config, plan.devices[0], case.part.split()[-1], plan.seconds)
        row["over_its_parts"] = row["median"] / (
            row["products_seconds"] + row["attention_seconds"])
    return row


def _peers(plan: Plan, device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(row name, what makes the row) of PyTorch's side."""
    config, place = plan.config("auto"), torch_peers.Place()

    def row(make: Callable[[], torch_peers.Peer], case: Callable[[], Case | None]):
        def made() -> dict[str, Any]:
            reason = torch_peers.why_not()
            if reason:
                return {"backend": "torch", "skipped": reason}
            ours = case()
            return torch_peers.time_peer(make, place, plan.seconds,
                                         ours.flops() if ours else None, device)
        return made

    def name(*parts: str) -> str:
        return row_name(config.name, *parts, "torch", overrides=plan.overrides)

    if plan.what == "block":
        for part in plan.parts:
            yield name("block", part), row(
                lambda part=part: torch_peers.block(config, part, place),
                lambda part=part: block.block_case(plan.config("auto"), plan.devices[0], part))
    elif plan.what == "forward":
        yield name("forward"), row(
            lambda: torch_peers.forward(config, place),
            lambda: programs.forward_case(plan.config("auto"), plan.devices, "bfloat16"))
    elif plan.what == "train":
        for step in plan.steps:
            yield name(step), row(
                lambda step=step: torch_peers.training(config, place)[step],
                lambda step=step: next(c for c in programs.train_cases(
                    plan.config("auto"), plan.devices) if c.part == step))
    elif plan.what == "vae":
        yield name("vae"), row(
            lambda: torch_peers.decode(config, dataclasses.replace(place, compiled=False)),
            lambda: pipeline.decode_case(plan.config("auto"), plan.devices[0], "chunk 1"))
