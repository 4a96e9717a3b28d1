"""Compile a program for a topology and read off it: memory, FLOPs, traffic, time.

Memory is the compiler's own figure. Times are models, for ranking: FLOPs at the stated efficiency of
each kind of product, and the wire bytes of every collective at the rate of the links it crosses.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax
from jax.sharding import Mesh

from apt_jax.plan.chips import Chip, Topology
from apt_jax.plan.collectives import Collective, collectives
from apt_jax.plan.flops import Flops, count_flops
from apt_jax.plan.hlo import parse_hlo
from apt_jax.plan.programs import Program

# Part of the peak that today's kernels reach on an H100 (700, 690 and 492 of 989 TFLOP/s, published);
# taken for every chip. The backward pass does 2 of 3 parts of a training step's attention.
MATMUL_EFFICIENCY = 0.71
ATTENTION_EFFICIENCY = {"inference": 0.70, "training": 0.54}
# An array that every device holds in full, or a float32 gather in the steady state, is worth a line
# from this size on.
NOTE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes. Bytes are per device and call of the program."""

    kind: str
    axes: str
    dtype: str
    count: float
    wire: float
    seconds: float
    overlapped: float  # part of the wire bytes that compute hides


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One compiled program, per device; bytes, FLOPs over all devices, seconds.

    Attributes:
      parts: bytes of each named part of the arguments.
      arguments, outputs, aliased, temporaries, code: the compiler's memory analysis.
      peak: what the device must hold: arguments + outputs - aliased + temporaries + code.
      flops: model FLOPs of the whole batch (nothing recomputed).
      executed: with what rematerialisation computes again.
      floor: seconds at the chip's peak rate.
      compute, exposed, step: modelled seconds of products, of traffic that nothing hides, together.
      notes: what deserves a look: float32 gathers, arrays held in full everywhere.
    """

    name: str
    parts: dict[str, int]
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: Flops
    executed: Flops
    floor: float
    compute: float
    exposed: float
    traffic: tuple[Traffic, ...]
    collectives: tuple[Collective, ...]
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def step(self) -> float:
        return self.compute + self.exposed


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of arrays or abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def measure(program: Program, topology: Topology, mesh: Mesh,
            options: dict[str, Any] | None = None) -> tuple[Measurement, str]:
    """Compile and read; returns the measurement and the compiled program's text.

    options: XLA compiler options of this program.
    """
    compiled = program.function.lower(*program.args).compile(compiler_options=options or None)
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    reference, args = program.reference()
    flops = count_flops(reference, *args)
    executed = _executed(program, flops)
    shape = dict(mesh.shape)
    found = collectives(parse_hlo(text), shape)
    chip, devices = topology.chip, topology.devices
    training = program.name != "one-step inference"
    compute = (executed.matmul + executed.convolution) / (chip.flops * MATMUL_EFFICIENCY)
    compute += executed.attention / (
        chip.flops * ATTENTION_EFFICIENCY["training" if training else "inference"])
    compute /= devices
    traffic = _traffic(found, chip)
    hidden = sum(t.seconds * t.overlapped for t in traffic)
    exposed = sum(t.seconds * (1 - t.overlapped) for t in traffic) + max(0.0, hidden - compute)
    return Measurement(
        name=program.name,
        parts={name: shard_bytes(tree) for name, tree in program.parts.items()
               if jax.tree.leaves(tree)},
        arguments=memory.argument_size_in_bytes, outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes, temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes, flops=flops, executed=executed,
        floor=flops.total / (chip.flops * devices), compute=compute, exposed=exposed,
        traffic=traffic, collectives=tuple(found), notes=tuple(_notes(program, found, shape)),
    ), text


def _executed(program: Program, model: Flops) -> Flops:
    """What runs, recomputation included, with the attention counted as the plain one does it."""
    try:
        return count_flops(program.function, *program.args)
    except ValueError:  # a kernel inside: scale the model's work by what a layer's remat repeats
        repeated = 4 / 3 if "step" in program.name else 1.0
        return Flops(model.matmul * repeated, model.attention * repeated, model.convolution)


def link_rate(collective: Collective, chip: Chip) -> float:
    """Bytes/s that a device of this collective can send.

    Inside a host (or a TPU slice) the fast network; between hosts every member of a group brings
    its own port, so members that share a host add up, never beyond the fast network.
    """
    if not chip.host_devices or not collective.members:
        return chip.fast
    hosts = defaultdict(int)
    for member in collective.members:
        hosts[member // chip.host_devices] += 1
    if len(hosts) == 1:
        return chip.fast
    return min(chip.fast, chip.slow * max(hosts.values()))


def _traffic(found: list[Collective], chip: Chip) -> tuple[Traffic, ...]:
    groups: dict[tuple, list[Collective]] = defaultdict(list)
    for c in found:
        groups[c.kind, c.axes, c.dtype].append(c)
    rows = []
    for (kind, axes, dtype), members in groups.items():
        wire = sum(c.wire * c.times for c in members)
        hidden = sum(c.wire * c.times for c in members if c.overlapped)
        rows.append(Traffic(kind, axes, dtype, sum(c.times for c in members), wire,
                            sum(c.wire * c.times / link_rate(c, chip) for c in members),
                            hidden / wire if wire else 0.0))
    return tuple(sorted(rows, key=lambda t: -t.wire))


def _notes(program: Program, found: list[Collective], shape: dict[str, int]) -> list[str]:
    notes = []
    for c in found:
        if c.kind == "all-gather" and c.dtype == "f32" and c.in_loop and c.bytes >= NOTE_BYTES:
            notes.append(f"float32 all-gather over {c.axes}: {c.bytes / 2**20:.0f} MiB, "
                         f"{c.times:g} times ({c.name})")
        if (c.kind == "all-reduce" and "fsdp" in c.axes.split("+")
                and c.bytes >= NOTE_BYTES):
            notes.append(f"all-reduce over {c.axes} of {c.bytes / 2**20:.0f} MiB, {c.times:g} "
                         f"times, where a reduce-scatter would do ({c.name})")
    if math.prod(shape.values()) > 1:
        for name, tree in program.parts.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                size = math.prod(leaf.shape) * leaf.dtype.itemsize
                if size >= NOTE_BYTES and leaf.sharding.is_fully_replicated:
                    where = jax.tree_util.keystr(path, simple=True, separator="/")
                    notes.append(f"every device holds all of {name}/{where}: "
                                 f"{size / 2**20:.0f} MiB")
    return notes
