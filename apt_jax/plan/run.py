"""Plan a run: which programs, do they fit, and the smallest change that would make them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from apt_jax.errors import UserError
from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.parallel.mesh import batch_ways, make_mesh
from apt_jax.plan.chips import GIB, Topology
from apt_jax.plan.devices import describe
from apt_jax.plan.measure import Measurement, measure
from apt_jax.plan.programs import Program, inference_program, sample_shape, training_programs

log = logging.getLogger("apt_jax")
# What the driver, the collective library and the allocator's rounding take of a device's memory.
RESERVE = 0.06
# What a user can change, mildest first: (what to write, how).
REMEDIES: tuple[tuple[str, str, Any], ...] = (
    ("model.remat", "model.remat", "full"),
    ("mesh.context", "mesh.context", 2),
    ("mesh.context", "mesh.context", 4),
    ("mesh.context", "mesh.context", 8),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The programs of one config on one topology.

    batch: samples of one microbatch over all devices. usable: bytes of a device that a program may
    take. remedy: the smallest change found that fits, "" where it fits already or none was found.
    """

    topology: Topology
    mesh: dict[str, int]
    batch: int
    tokens: int
    parameters: dict[str, int]
    programs: tuple[Measurement, ...]
    remedy: str = ""

    @property
    def usable(self) -> int:
        return int(self.topology.chip.memory * (1 - RESERVE))

    @property
    def peak(self) -> int:
        return max(p.peak for p in self.programs)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def step(self) -> float:
        """Modelled seconds of one microbatch through every training step."""
        return sum(p.step for p in self.programs if "step" in p.name and "one-" not in p.name)

    def to_json(self) -> dict[str, Any]:
        """Plain values: "fits", "peak_gib", "flops_forward_tflop", per program and in all."""
        forward = next((p for p in self.programs if p.name == "one-step inference"), None)
        programs = {p.name: {
            "fits": p.peak <= self.usable, "peak_gib": p.peak / GIB,
            "arguments_gib": p.arguments / GIB, "temporaries_gib": p.temporaries / GIB,
            "outputs_gib": p.outputs / GIB, "aliased_gib": p.aliased / GIB,
            "parts_gib": {k: v / GIB for k, v in p.parts.items()},
            "flops_tflop": p.flops.total / 1e12,
            "flops_matmul_tflop": p.flops.matmul / 1e12,
            "flops_attention_tflop": p.flops.attention / 1e12,
            "executed_tflop": p.executed.total / 1e12,
            "floor_seconds": p.floor, "step_seconds": p.step, "exposed_seconds": p.exposed,
            "collectives": [dataclasses.asdict(t) for t in p.traffic], "notes": list(p.notes),
        } for p in self.programs}
        return {
            "topology": self.topology.text, "devices": self.topology.devices, "mesh": self.mesh,
            "batch": self.batch, "tokens": self.tokens, "parameters": self.parameters,
            "fits": self.fits, "peak_gib": self.peak / GIB, "usable_gib": self.usable / GIB,
            "flops_forward_tflop": (forward.flops.total / self.batch / 1e12 if forward else None),
            "step_seconds": self.step, "remedy": self.remedy, "programs": programs,
        }


def build_programs(config: Any, devices: list, batch: int, inference: bool) -> list[Program]:
    programs = training_programs(config, devices, batch)
    if inference:
        programs.append(inference_program(config, devices, batch))
    return programs


def plan(config: Any, topology: Topology, *, inference: bool = True,
         options: dict[str, Any] | None = None, keep: Callable[[str, str], None] | None = None,
         tell: Callable[[str], None] = lambda text: None) -> Plan:
    """Compile the programs of a config for a topology and measure them.

    Args:
      config: a validated config; its mesh must fit the topology.
      options: XLA compiler options.
      keep: called with (program's name, compiled text).
      tell: called with a line of progress.
    """
    from apt_jax.models.presets import make_discriminator, make_generator

    config = for_chip(config, topology)
    devices = describe(topology)
    mesh = make_mesh(config.mesh, devices)
    batch = batch_ways(mesh)
    if config.train.accumulate != 1 and config.train.batch_size > batch:
        # Two microbatches hold all that more of them hold: the sum of gradients, and one at work.
        batch *= 2
        config.train.accumulate = 2
    else:
        batch = max(batch, config.train.batch_size // batch * batch)
    config.train.batch_size = batch
    measured = []
    for program in build_programs(config, devices, batch, inference):
        tell(f"{topology.text}: compiling {program.name}")
        with choosing(hardware=Hardware.of(devices[0])):  # kernels for there, not for here
            found, text = measure(program, topology, mesh, options)
        measured.append(found)
        if keep is not None:
            keep(program.name, text)
    frames, height, width, _ = sample_shape(config)
    tokens = 1
    for side, patch in zip((frames, height, width), config.model.patch, strict=True):
        tokens *= side // patch
    parameters = {"generator": make_generator(config.model).parameter_count()}
    if config.stage == "adversarial":
        parameters["discriminator"] = make_discriminator(
            config.model, config.discriminator).parameter_count()
    return Plan(topology, dict(mesh.shape), batch, tokens, parameters, tuple(measured))


def for_chip(config: Any, topology: Topology) -> Any:
    """A copy of the config whose attention is the chip's own kernel, unless one was asked for."""
    config = config.copy_and_resolve_references()
    if "attention" in config.model and config.model.attention == "auto":
        config.model.attention = topology.chip.attention
    return config


def find_remedy(config: Any, topology: Topology, **settings: Any) -> str:
    """The first of REMEDIES (then of two at once) under which the config fits; "" if none does."""
    for count in (1, 2):
        for changes in itertools.combinations(REMEDIES, count):
            keys = [key for _, key, _ in changes]
            if len(set(keys)) < count:
                continue
            changed = config.copy_and_resolve_references()
            fresh = False
            for _, key, value in changes:
                group, field = key.split(".")
                fresh |= changed[group][field] != value
                changed[group][field] = value
            if not fresh:
                continue
            try:
                found = plan(changed, topology, inference=False, **settings)
            except UserError:
                continue  # a mesh that does not fit the devices or the heads
            if found.fits:
                return " ".join(f"--config.{key}={value}" for _, key, value in changes)
    return ""


def mesh_shapes(config: Any, devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of the four axes that the devices and the model's heads allow."""
    heads = config.model.heads
    for tensor in (1, 2, 4, 8):
        for context in (1, 2, 4, 8, 16):
            if devices % (tensor * context) or heads % tensor:
                continue
            rest = devices // (tensor * context)
            for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
                if fsdp * context * tensor > 256:  # shards thinner than a row of the weights
                    continue
                yield {"replica": rest // fsdp, "fsdp": fsdp, "context": context,
                       "tensor": tensor}


def sweep(config: Any, topology: Topology, remats: tuple[str, ...],
          tell: Callable[[str], None] = lambda text: None, **settings: Any
          ) -> list[tuple[str, Plan | str]]:
    """Plans of every mesh shape and rematerialisation policy, those that fit first, by step time
    per sample; the others with their peak, or with the reason why they could not be planned."""
    results = []
    shapes = list(mesh_shapes(config, topology.devices))
    for number, (shape, remat) in enumerate(itertools.product(shapes, remats), 1):
        changed = config.copy_and_resolve_references()
        changed.model.remat = remat
        for axis, size in shape.items():
            changed.mesh[axis] = size
        label = " ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one"
        label = f"{label}, remat {remat}"
        tell(f"[{number}/{len(shapes) * len(remats)}] {label}")
        try:
            results.append((label, plan(changed, topology, inference=False, **settings)))
        except Exception as error:  # a mesh that the model or the compiler refuses
            results.append((label, " ".join(str(error).split())[:120]))

    def order(row):
        _, found = row
        if isinstance(found, str):
            return (2, 0.0)
        return (0, found.step / found.batch) if found.fits else (1, found.peak)

    return sorted(results, key=order)
