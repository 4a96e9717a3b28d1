"""Compile a program for a topology and read off it: memory, FLOPs, traffic, time.

Memory is the compiler's own figure. Times are models, for ranking: FLOPs at the stated efficiency
of each kind of product, and the wire bytes of every collective at the rate of the links it crosses.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

import jax
from jax.sharding import Mesh

from apt_jax.kernels import dispatch
from apt_jax.plan.chips import Topology
from apt_jax.plan.collectives import Collective, collectives, unread
from apt_jax.plan.compiler import compile_text
from apt_jax.plan.flops import Flops, UncountedError, count_flops
from apt_jax.plan.hlo import parse_hlo
from apt_jax.plan.programs import Program
from apt_jax.plan.timeline import ATTENTION_EFFICIENCY, MATMUL_EFFICIENCY

# An array that every device holds in full, or a float32 gather in the steady state, is worth a line
# from this size on.
NOTE_BYTES = 64 * 2**20
# Sums of whole gradients over the axes that cut the parameters; vectors, which every device holds,
# are smaller.
SUM_BYTES = 4 * 2**20
UNREAD = "lie where the plan cannot follow"  # a note's words: what is not there is not known
HIDDEN = 0.95  # a collective of which less is hidden counts as exposed
# What compilers say when a program does not fit: XLA:TPU names both figures, others the last one.
_NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory|[Oo]ut of memory")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? ?\w*")
# Arguments and results are in this figure, whatever it calls it (tried: 2 + 6 + 24 + 6 GiB).
_REQUIRED = re.compile(r"memory required for [\w ]+\(([\d.]+)([KMGT]?)\) exceeds available \w+ "
                       r"\([\d.]+[KMGT]?\)")
_ALLOCATE = re.compile(r"allocat\w+ (?:of )?([\d.]+) ?([KMGT]?)i?B")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes. Bytes are per device and call of the program."""

    kind: str
    axes: str
    dtype: str
    count: float
    wire: float
    seconds: float
    overlapped: float  # part of the seconds that the work beside it hides


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One compiled program, per device; bytes, FLOPs over all devices, seconds.

    Attributes:
      parts: bytes of each named part of the arguments.
      arguments, outputs, aliased, temporaries, code: the compiler's memory analysis.
      peak: what the device must hold: arguments + outputs - aliased + temporaries + code.
      samples, microbatches: of one call; its microbatches run one after another.
      flops: model FLOPs of the whole batch (nothing recomputed).
      executed: with what rematerialisation computes again; the kernels' own recomputation in their
        backward pass is not in it.
      floor: seconds at the chip's peak rate.
      compute, exposed, step: modelled seconds of products, of traffic that nothing hides, together.
      notes: what deserves a look: float32 gathers, arrays held in full everywhere.
      refused: what the compiler said where it found no room; the memory is then what it named, and
        there are no collectives.
      attention, flags: the kernel and the XLA options of the compiled program (`Compiled`).
      context_minimum: bytes that a device must send over context at least, None where that is not
        known (programs.py).
    """

    name: str
    samples: int
    microbatches: int
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
    refused: str = ""
    attention: str = "not recorded"
    flags: dict[str, Any] | None = None
    context_minimum: float | None = 0.0

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def step(self) -> float:
        return self.compute + self.exposed

    @property
    def exposed_once(self) -> float:
        """The part of `exposed` that comes once a call, however many microbatches there are."""
        # The loop over the microbatches may be unrolled in part, and one turn peeled off: what runs
        # once may still belong to a turn, what runs more often never to the update.
        return sum(c.seconds * (1 - c.hidden) * c.times for c in self.collectives
                   if c.times == 1 and not c.steady)

    @property
    def context_bytes(self) -> float:
        """Bytes that a device sends over context alone: tokens, by all-to-all and around rings."""
        return sum(t.wire for t in self.traffic if t.axes == "context"
                   and t.kind in ("all-to-all", "collective-permute"))

    @property
    def steady(self) -> tuple[Traffic, ...]:
        """The traffic inside the loop over the layers."""
        return _traffic([c for c in self.collectives if c.steady])

    @property
    def exposed_steady(self) -> tuple[Collective, ...]:
        """Collectives in the loop over the layers that work does not hide, the longest first."""
        waits = [c for c in self.collectives if c.steady and c.hidden < HIDDEN]
        return tuple(sorted(waits, key=lambda c: -c.seconds * (1 - c.hidden) * c.times))


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of arrays or abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is read off a compiled program: its text and the compiler's memory analysis, in bytes.

    refused: what the compiler said where it found no room; there is no text then. attention: the
    kernel of its attention, by its name in model.attention, several joined by +. flags: the XLA
    options it was compiled with, None where they were not kept.
    """

    text: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    refused: str = ""
    attention: str = "not recorded"
    flags: dict[str, Any] | None = None


def compile_program(program: Program, options: dict[str, Any] | None = None) -> Compiled:
    """Compiles it; options: XLA compiler options of this program."""
    platform = next((device.platform for leaf in jax.tree.leaves(program.args) if leaf.sharding
                     for device in leaf.sharding.device_set), "")
    with dispatch.recording() as kernels:
        lowered = program.function.lower(*program.args)
    made = {"attention": "+".join(sorted(kernels)) or "oracle", "flags": dict(options or {})}
    try:
        compiled, text = compile_text(lowered, options, platform)
    except jax.errors.JaxRuntimeError as error:
        room = refusal(str(error))
        if room is None:
            raise
        arguments = shard_bytes(program.args)
        return Compiled("", arguments, 0, 0, max(0, room[1] - arguments), 0, room[0],
                        **made)
    said = compiled.memory_analysis()
    return Compiled(text, said.argument_size_in_bytes, said.output_size_in_bytes,
                    said.alias_size_in_bytes, said.temp_size_in_bytes,
                    said.generated_code_size_in_bytes, **made)


def measure(program: Program, topology: Topology, mesh: Mesh, compiled: Compiled) -> Measurement:
    """Reads memory, FLOPs, traffic and time off a program that was compiled for the topology."""
    shape = dict(mesh.shape)
    found: list[Collective] = []
    notes: list[str] = []
    if compiled.text:
        text = parse_hlo(compiled.text)
        found = collectives(text, shape, topology.chip, program.microbatches)
        if missed := unread(text):
            notes.append(f"{len(missed)} collectives {UNREAD} ({missed[0]}): traffic "
                         "and time are without them")
    flops, executed = work(program)
    chip, devices = topology.chip, topology.devices
    compute = (executed.matmul + executed.convolution) / (chip.flops * MATMUL_EFFICIENCY)
    compute += executed.attention / (
        chip.flops * ATTENTION_EFFICIENCY["training" if program.training else "inference"])
    return Measurement(
        name=program.name, samples=program.samples, microbatches=program.microbatches,
        parts={name: shard_bytes(tree) for name, tree in program.parts.items()
               if jax.tree.leaves(tree)},
        arguments=compiled.arguments, outputs=compiled.outputs, aliased=compiled.aliased,
        temporaries=compiled.temporaries, code=compiled.code, flops=flops, executed=executed,
        floor=flops.total / (chip.flops * devices), compute=compute / devices,
        exposed=sum(c.seconds * (1 - c.hidden) * c.times for c in found),
        traffic=_traffic(found), collectives=tuple(found),
        notes=(*notes, *_notes(program, found, shape)),
        refused=compiled.refused, attention=compiled.attention, flags=compiled.flags,
        context_minimum=program.context_minimum)


def refusal(message: str) -> tuple[str, int] | None:
    """(the compiler's sentence, the bytes it wanted; 0 where it named none) from an error that says
    there is no room; None for any other error."""
    if not _NO_ROOM.search(message):
        return None
    said = " ".join(message.split())
    for pattern in (_USED, _REQUIRED, _ALLOCATE):
        if found := pattern.search(said):
            return found.group(0), int(float(found.group(1)) * _UNITS[found.group(2)])
    return said[:120], 0


def work(program: Program) -> tuple[Flops, Flops]:
    """Model FLOPs of a call, and the executed ones: with the recomputation of the config's policy.

    Both are counted with the plain attention standing for the kernel, whose loops cannot be read.
    Where the executed program cannot be counted, the model's work is scaled by what the
    recomputation of every layer repeats of a training step.
    """
    function, args = program.reference("none")
    flops = count_flops(function, *args)
    if not program.training:
        return flops, flops
    try:
        function, args = program.reference(None)
        executed = count_flops(function, *args)
        if program.keeps_attention:  # the plain one computes its scores again, a kernel does not
            executed = dataclasses.replace(executed, attention=flops.attention)
        return flops, executed
    except UncountedError:
        return flops, Flops(*(value * 4 / 3 for value in dataclasses.astuple(flops)))


def _traffic(found: list[Collective]) -> tuple[Traffic, ...]:
    groups: dict[tuple, list[Collective]] = defaultdict(list)
    for c in found:
        groups[c.kind, c.axes, c.dtype].append(c)
    rows = []
    for (kind, axes, dtype), members in groups.items():
        wire = sum(c.wire * c.times for c in members)
        seconds = sum(c.seconds * c.times for c in members)
        hidden = sum(c.seconds * c.hidden * c.times for c in members)
        rows.append(Traffic(kind, axes, dtype, sum(c.times for c in members), wire, seconds,
                            hidden / seconds if seconds else 0.0))
    return tuple(sorted(rows, key=lambda t: -t.wire))


def _notes(program: Program, found: list[Collective], shape: dict[str, int]) -> list[str]:
    """float32 gathers and arrays that every device holds in full, from NOTE_BYTES on; sums where a
    reduce-scatter would do or where only tokens should travel, from SUM_BYTES on."""
    notes = []
    for c in found:
        size = c.float32 if c.kind == "all-gather" else c.bytes
        if size < (SUM_BYTES if c.kind == "all-reduce" else NOTE_BYTES):
            continue
        what = f"of {size / 2**20:.0f} MiB, {c.times:g} times ({c.name})"
        axes = set(c.axes.split("+"))
        if c.kind == "all-gather":
            where = "in the layers" if c.steady else "outside the layers"
            notes.append(f"float32 all-gather over {c.axes}, {where}, {what}")
        if not program.training or c.kind != "all-reduce":
            continue  # one sample that the batch axes cannot cut: its activations are summed
        if "fsdp" in axes:
            notes.append(f"all-reduce over {c.axes}, where a reduce-scatter would do, {what}")
        elif "context" in axes:
            # XLA names no array: it may be what the context's devices share, a sample's text
            notes.append(f"all-reduce over {c.axes}, of gradients of a sample's text or of "
                         f"parameters, {what}")
    if math.prod(shape.values()) > 1:
        for name, tree in program.parts.items():
            if name == "batch":  # its few samples on many devices are no mistake
                continue
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                size = math.prod(leaf.shape) * leaf.dtype.itemsize
                if size >= NOTE_BYTES and leaf.sharding.is_fully_replicated:
                    where = jax.tree_util.keystr(path, simple=True, separator="/")
                    notes.append(f"every device holds all of {name}/{where}: "
                                 f"{size / 2**20:.0f} MiB")
    return notes
