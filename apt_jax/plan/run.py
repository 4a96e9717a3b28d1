"""Plan a run: which programs, do they fit, and the smallest change that would make them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.errors import UserError
from apt_jax.kernels.choice import Hardware
from apt_jax.kernels.dispatch import Request
from apt_jax.kernels.dispatch import refusal as cannot_serve
from apt_jax.parallel.mesh import divisors, make_mesh
from apt_jax.plan.advice import launch_notes
from apt_jax.plan.chips import GIB, Topology
from apt_jax.plan.devices import describe, elsewhere
from apt_jax.plan.kept import Kept
from apt_jax.plan.measure import Measurement, compile_program, measure, work
from apt_jax.plan.programs import (
    INFERENCE,
    Program,
    asked_batch,
    batch_field,
    batch_of,
    inference_program,
    sample_shape,
    training_programs,
)

log = logging.getLogger("apt_jax")
# What the driver, the collective library and the allocator's rounding take of a device's memory.
# The launch files give jax the rest (XLA_PYTHON_CLIENT_MEM_FRACTION; it would take 0.75 by itself).
RESERVE = 0.06
# What is tried: heads are cut over tensor and one host's links carry it; context may leave the
# host; shards of larger copies are thinner than a row of the weights.
WIDEST_TENSOR, WIDEST_CONTEXT, LARGEST_COPY = 8, 16, 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """The programs of one config on one topology.

    batch: samples of one update over all devices. usable: bytes of a device that a program may
    take. remedy: the smallest change found that fits, "" where none was found, None where none was
    looked for. forward: FLOPs of the generator for one sample. notes: what the launch must know
    (advice.py).
    """

    topology: Topology
    mesh: dict[str, int]
    batch: int
    tokens: int
    parameters: dict[str, int]
    programs: tuple[Measurement, ...]
    remedy: str | None = None
    forward: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        return int(self.topology.chip.memory * (1 - RESERVE))

    @property
    def peak(self) -> int:
        return max(p.peak for p in self.programs)

    @property
    def fits(self) -> bool:
        return all(map(self.fit, self.programs))

    def fit(self, program: Measurement) -> bool:
        return not program.refused and program.peak <= self.usable

    @property
    def attention(self) -> str:
        """The kernels of the programs' attention, by their names in model.attention."""
        return "+".join(sorted({k for p in self.programs for k in p.attention.split("+")}))

    @property
    def flags(self) -> dict[str, Any] | None:
        """The XLA options that all programs were compiled with; None where not all are known."""
        first = self.programs[0].flags
        return first if all(p.flags == first for p in self.programs) else None

    @property
    def microbatch(self) -> int:
        """Samples at a time, over all devices, of the training steps."""
        return self.batch // max(p.microbatches for p in self.programs)

    @property
    def step(self) -> float:
        """Modelled seconds of one update: every training step over the whole batch."""
        return sum(p.step for p in self.programs if p.name != INFERENCE)

    def to_json(self) -> dict[str, Any]:
        """Plain values: "fits", "peak_gib", "flops_forward_tflop", per program and in all."""
        programs = {p.name: {
            "fits": self.fit(p), "peak_gib": p.peak / GIB, "refused": p.refused,
            "samples": p.samples, "microbatches": p.microbatches, "attention": p.attention,
            # of the forward passes of all networks that it evaluates, per sample
            "flops_forward_tflop": p.flops.forward / p.samples / 1e12,
            "arguments_gib": p.arguments / GIB, "temporaries_gib": p.temporaries / GIB,
            "outputs_gib": p.outputs / GIB, "aliased_gib": p.aliased / GIB,
            "parts_gib": {k: v / GIB for k, v in p.parts.items()},
            "flops_tflop": p.flops.total / 1e12,
            "flops_matmul_tflop": p.flops.matmul / 1e12,
            "flops_attention_tflop": p.flops.attention / 1e12,
            "executed_tflop": p.executed.total / 1e12,
            "floor_seconds": p.floor, "step_seconds": p.step, "compute_seconds": p.compute,
            "exposed_seconds": p.exposed, "exposed_once_seconds": p.exposed_once,
            "collectives": [dataclasses.asdict(t) for t in p.traffic],
            "steady_collectives": [dataclasses.asdict(t) for t in p.steady],
            "exposed_steady": [
                {"name": c.name, "kind": c.kind, "axes": c.axes, "dtype": c.dtype,
                 "bytes": c.bytes, "times": c.times, "seconds": c.seconds, "hidden": c.hidden}
                for c in p.exposed_steady],
            "context_gib": p.context_bytes / GIB, "context_minimum_gib": (
                None if p.context_minimum is None else p.context_minimum / GIB),
            "notes": list(p.notes),
        } for p in self.programs}
        return {
            "topology": self.topology.text, "devices": self.topology.devices, "mesh": self.mesh,
            "batch": self.batch, "microbatch": self.microbatch, "tokens": self.tokens,
            "parameters": self.parameters,
            "fits": self.fits, "peak_gib": self.peak / GIB, "usable_gib": self.usable / GIB,
            "flops_forward_tflop": self.forward / 1e12,
            "step_seconds": self.step, "remedy": self.remedy, "notes": list(self.notes),
            "attention": self.attention, "flags": self.flags,
            "programs": programs,
        }


Row = tuple[str, str, Plan | str]  # of a sweep: mesh, remat, the plan or why there is none


def build_programs(config: Any, devices: list, inference: bool) -> list[Program]:
    """The programs of a run, those of training first."""
    programs = training_programs(config, devices)
    if inference:
        programs.append(inference_program(config, devices))
    return programs


def plan(config: Any, topology: Topology, *, inference: bool = True,
         options: dict[str, Any] | None = None, kept: Kept | None = None,
         tell: Callable[[str], None] = lambda text: None, first: str = "") -> Plan:
    """Compile the programs of a config for a topology and measure them.

    Args:
      config: a validated config; its mesh must fit the topology.
      options: XLA compiler options, all of them known to the compiler (`flags.options.known_options`).
      kept: where compiled programs are kept; those that are there are not compiled again.
      tell: called with a line of progress.
      first: the name of a program to begin with, the largest; where it does not fit, the others are
        not compiled and not in the plan.
    """
    from apt_jax.models.presets import make_discriminator, make_generator

    devices = describe(topology)
    config = for_chip(config, topology, Hardware.of(devices[0]))
    mesh = make_mesh(config.mesh, devices)
    batch = batch_of(config, mesh)
    programs = build_programs(config, devices, inference)
    programs.sort(key=lambda program: program.name != first)  # stable
    measured: list[Measurement] = []
    usable = topology.chip.memory * (1 - RESERVE)
    for program in programs:
        compiled = kept.read(program.name, options or {}) if kept else None
        if compiled is None:
            tell(f"{topology.text}: compiling {program.name}")
            with elsewhere(devices[0]):  # kernels for there, not for here
                compiled = compile_program(program, options)
            if kept:
                kept.write(program.name, compiled)
        found = measure(program, topology, mesh, compiled)
        measured.append(found)
        if program.name == first and (found.refused or found.peak > usable):
            break
    frames, height, width, _ = sample_shape(config)
    tokens = 1
    for side, patch in zip((frames, height, width), config.model.patch, strict=True):
        tokens *= side // patch
    parameters = {"generator": make_generator(config.model).parameter_count()}
    if config.stage == "adversarial":
        parameters["discriminator"] = make_discriminator(
            config.model, config.discriminator).parameter_count()
    found = Plan(topology, dict(mesh.shape), batch, tokens, parameters, tuple(measured),
                 forward=forward_flops(config, devices, measured))
    return dataclasses.replace(
        found, notes=launch_notes(config, topology.devices, found.step))


def forward_flops(config: Any, devices: list, measured: list[Measurement]) -> float:
    """FLOPs of the generator for one sample: as measured, else counted."""
    for found in measured:
        if found.name == INFERENCE:
            return found.flops.forward / found.samples
    program = inference_program(config, devices)
    return work(program)[0].forward / program.samples


def for_chip(config: Any, topology: Topology, hardware: Hardware) -> Any:
    """A copy of the config whose attention is the chip's own kernel, unless one was asked for or it
    cannot serve the network's heads or the exact R1's second derivative ("auto" then finds what
    can)."""
    config = config.copy_and_resolve_references()
    model, objective = config.model, config.objective.adversarial
    if "attention" in model and model.attention == "auto":
        exact = config.stage == "adversarial" and objective.r1 and objective.r1_mode == "exact"
        request = Request(1, 2**16, 2**16, model.heads, model.width // model.heads,
                          jnp.dtype(model.dtype), True, 2 if exact else 1, hardware)
        if cannot_serve(topology.chip.attention, request) is None:
            model.attention = topology.chip.attention
    return config


def remedies(config: Any, found: Plan) -> list[dict[str, Any]]:
    """What a user can change so that it fits, mildest first: key -> value, of one change.

    found: its plan, which does not fit; its mesh has the sizes that -1 stands for.
    """
    wanted = [{"train.accumulate": 0}]  # the same batch, one sample at a time
    if found.mesh.get("replica", 1) > 1:  # one copy of the parameters over all devices
        wanted.append({"mesh.replica": 1, "mesh.fsdp": -1})
    wanted.append({"model.remat": "full"})
    wider = [size for size in divisors(found.topology.devices, WIDEST_CONTEXT)
             if size > found.mesh.get("context", 1)]
    # The wider axis needs devices that a fixed size would keep.
    wanted += [{"mesh.context": size, "mesh.fsdp": -1} for size in wider[:3]]
    worst = max(found.programs, key=lambda p: p.peak)
    if worst.name == INFERENCE:  # takes one sample as it is and keeps nothing for a backward pass
        wanted = [change for change in wanted if "mesh.fsdp" in change]
    # The samples themselves: only where they are large beside what is missing.
    key = batch_field(config)
    for part in (2, 4):
        saved = worst.parts.get("batch", 0) * (1 - 1 / part)
        if config.train[key] >= part and saved > (worst.peak - found.usable) / 2:
            wanted.append({f"train.{key}": config.train[key] // part})
    changes = [{key: value for key, value in change.items()
                if config[key.split(".")[0]][key.split(".")[1]] != value} for change in wanted]
    return [change for change in changes if change]


def find_remedy(config: Any, topology: Topology, found: Plan, **settings: Any) -> str:
    """The first of `remedies` (then of two at once) under which the config fits; "" if none does.

    found: its plan, which does not fit. The program that needs most is tried first.
    """
    worst = max(found.programs, key=lambda p: p.peak).name
    inference = any(p.name == INFERENCE for p in found.programs)
    for count in (1, 2):
        for parts in itertools.combinations(remedies(config, found), count):
            changes = {key: value for part in parts for key, value in part.items()}
            if any(changes[key] != value for part in parts for key, value in part.items()):
                continue  # two sizes of one axis
            changed = config.copy_and_resolve_references()
            for key, value in changes.items():
                group, field = key.split(".")
                changed[group][field] = value
            try:
                fitting = plan(changed, topology, inference=inference, first=worst, **settings)
            except (UserError, ValueError, jax.errors.JaxRuntimeError):
                continue  # a mesh that the devices, the heads, jax or the compiler refuse
            if fitting.fits:
                return " ".join(f"--config.{key}={value}" for key, value in changes.items())
    return ""


def mesh_shapes(config: Any, devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of all the devices that the batch, and for tensor the heads, allow: tensor up to
    WIDEST_TENSOR, context up to WIDEST_CONTEXT, copies of at most LARGEST_COPY devices.

    The model may still refuse one for its widths or heads.
    """
    for tensor in divisors(devices, WIDEST_TENSOR):
        if config.model.heads % tensor:
            continue
        for context in divisors(devices // tensor, WIDEST_CONTEXT):
            rest = devices // (tensor * context)
            if rest * (config.train.accumulate or 1) > asked_batch(config):
                continue  # more ways than samples
            for fsdp in divisors(rest, LARGEST_COPY // (context * tensor)):
                yield {"replica": rest // fsdp, "fsdp": fsdp, "context": context,
                       "tensor": tensor}


def sweep(config: Any, topology: Topology, remats: tuple[str, ...],
          tell: Callable[[str], None] = lambda text: None,
          each: Callable[[list[Row]], None] = lambda rows: None, **settings: Any) -> list[Row]:
    """Plans of every mesh shape and rematerialisation policy, those that fit first, by step time per
    sample; the others with their peak, or with the reason why they could not be planned.

    each: called after every plan with the rows until then, in that order.
    """
    results: list[Row] = []
    shapes = list(mesh_shapes(config, topology.devices))
    for number, (shape, remat) in enumerate(itertools.product(shapes, remats), 1):
        changed = config.copy_and_resolve_references()
        changed.model.remat = remat
        for axis, size in shape.items():
            changed.mesh[axis] = size
        label = " ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one"
        tell(f"[{number}/{len(shapes) * len(remats)}] {label}, remat {remat}")
        try:
            results.append((label, remat, plan(changed, topology, inference=False, **settings)))
        except (UserError, ValueError, jax.errors.JaxRuntimeError) as error:
            # a mesh that the model or the compiler refuses
            results.append((label, remat, " ".join(str(error).split())[:120]))
        each(rank(results))
    return rank(results)


def rank(results: list[Row]) -> list[Row]:
    """Plans that fit by modelled time per sample, then those that do not by their peak, then
    errors."""
    def order(row: Row) -> tuple[int, float]:
        *_, found = row
        if isinstance(found, str):
            return (2, 0.0)
        return (0, found.step / found.batch) if found.fits else (1, float(found.peak))

    return sorted(results, key=order)
