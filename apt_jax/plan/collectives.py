"""The collectives of a compiled program: kind, bytes, mesh axis, how often, hidden or exposed."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from apt_jax.plan.chips import Chip
from apt_jax.plan.hlo import Array, Instruction, Program
from apt_jax.plan.timeline import Timeline, link_rate

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]"
                   r"(?:T\(([\d,]+)\))?\))? \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of KINDS.
      axes: mesh axes that the devices of one group span ("fsdp", "replica+fsdp", "?" if none fit).
      group: devices of one group.
      dtype: of what travels; of several arrays, the one that most of the bytes have.
      bytes: of the whole result (all-gather), the whole input (reduce-scatter) or the array.
      float32: the part of the bytes that are float32, whatever else travels with them.
      wire: bytes that each device sends, on a ring.
      times: runs per call of the program.
      steady: it runs more often than there are microbatches: inside the loop over the layers.
      members: device numbers of the first group.
      seconds: of one run on its links. hidden: part of that, 0 to 1, that the work beside it hides
        (timeline.py); 0 where nothing was asked about time.
    """

    name: str
    kind: str
    axes: str
    group: int
    dtype: str
    bytes: int
    wire: float
    times: float
    steady: bool
    members: tuple[int, ...] = ()
    seconds: float = 0.0
    hidden: float = 0.0
    float32: int = 0


def collectives(program: Program, mesh_shape: Mapping[str, int], chip: Chip | None = None,
                microbatches: int = 1) -> list[Collective]:
    """All collectives of a program compiled for a mesh of these axis sizes (row-major ids).

    chip: weighs each transfer against the work beside it. microbatches: of one call.
    """
    groups_of_axes = _axis_groups(mesh_shape)
    devices = int(np.prod(list(mesh_shape.values())))
    found: dict[tuple[str, str], Collective] = {}
    starts: dict[tuple[str, str], str] = {}
    sends: dict[tuple[str, str], tuple[str, str]] = {}  # where what travels is handed over
    for computation, times in program.walk():
        instructions = program.computations[computation]
        shapes = {i.name: i.result for i in instructions}
        for position, instruction in enumerate(instructions):
            key = computation, instruction.name
            inner = program.wrapped(instruction) or instruction
            kind = inner.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if key in found:  # reached from a second place
                again = found[key].times + times
                found[key] = dataclasses.replace(found[key], times=again,
                                                 steady=again > microbatches)
                continue
            begun = instruction.opcode.endswith("-start")
            done = _done(instructions, position) if begun else None
            if done is not None:
                sends[key] = computation, _sent(instructions[position:done])
                starts[computation, instructions[done].name] = sends[key][1]
                arrays = instructions[done].result
            elif inner is not instruction or not begun:
                arrays = inner.result
            else:  # a start's result lists its operands too
                arrays = tuple(a for n in instruction.operand_names for a in shapes.get(n, ()))
            members = _groups(inner, devices)
            size = max((len(g) for g in members), default=1)
            total = _bytes(arrays)
            if begun and done is None and inner is instruction and kind == "all-gather":
                total *= size  # of the operands
            elif kind == "reduce-scatter" and not (begun and done is None and inner is instruction):
                total *= size  # of the results
            if kind == "all-reduce" and "all-reduce-scatter" in computation:
                kind = "reduce-scatter"  # how TPUs spell it: a fusion that keeps one slice
            wire = _wire(kind, total, size)
            wide = _bytes([a for a in arrays if a.dtype == "f32"]) / max(1, _bytes(arrays))
            found[key] = Collective(
                instruction.name, kind, _axes(members, groups_of_axes, kind), size,
                _dtype(arrays), total, wire, times, times > microbatches,
                members[0] if members else (),
                wire / link_rate(members[0] if members else (), chip) if chip else 0.0,
                float32=round(total * wide))
    if chip is None:
        return list(found.values())
    played = Timeline(program, chip,
                      {sends.get(key, key): (c.axes, c.seconds) for key, c in found.items()},
                      starts)
    return [dataclasses.replace(c, hidden=_share(
        c.seconds, played.exposed.get(sends.get(key, key), c.seconds))) for key, c in found.items()]


def unread(program: Program) -> list[str]:
    """Names of the collectives that lie where `collectives` does not come: what XLA wraps in a way
    that is not known here. Their bytes and time would be missing."""
    met: set[str] = set()
    for computation, _ in program.walk():
        for instruction in program.computations[computation]:
            met.add((program.wrapped(instruction) or instruction).name)
    return sorted(i.name for body in program.computations.values() for i in body
                  if i.opcode.removesuffix("-start") in KINDS and i.name not in met)


def _share(seconds: float, exposed: float) -> float:
    return 1.0 - min(1.0, exposed / seconds) if seconds > 0 else 1.0


def _dtype(arrays: Sequence[Array]) -> str:
    """XLA joins arrays of several types in one transfer: matrices, and their float32 scales."""
    size: dict[str, int] = {}
    for array in arrays:
        size[array.dtype] = size.get(array.dtype, 0) + array.bytes
    return max(size, key=size.__getitem__, default="?")


def _bytes(arrays: Sequence[Array]) -> int:
    """Of what travels: scalar integers beside other arrays are the transfer's own bookkeeping."""
    own = [a for a in arrays if len(arrays) > 1 and not a.shape and a.dtype in ("u32", "s32")]
    return sum(a.bytes for a in arrays) - sum(a.bytes for a in own)


def _wire(kind: str, size: int, group: int) -> float:
    if kind == "collective-permute":
        return float(size)
    share = (group - 1) / group if group else 0.0
    return size * share * (2.0 if kind == "all-reduce" else 1.0)


def _done(instructions: Sequence[Instruction], start: int) -> int | None:
    """Where the transfer begun at `start` ends; async-updates may lie between."""
    names = {instructions[start].name}
    for i in range(start + 1, len(instructions)):
        if names.isdisjoint(instructions[i].operand_names):
            continue
        if instructions[i].opcode.endswith("-done"):
            return i
        if instructions[i].opcode == "async-update":
            names.add(instructions[i].name)
    return None


def _sent(instructions: Sequence[Instruction]) -> str:
    """The name of the instruction from which a transfer that begins with the first of these runs:
    itself, or, where it was given nothing to send (a TPU's sparse cores are called first), the
    update that hands it over."""
    start = instructions[0]
    if start.operand_names:
        return start.name
    return next((i.name for i in instructions[1:]
                 if i.opcode == "async-update" and start.name in i.operand_names
                 and len(i.operand_names) > 1), start.name)


# -- which devices talk to each other


def _groups(instruction: Instruction, devices: int) -> list[tuple[int, ...]]:
    """The device groups of an instruction, in any of the notations that XLA prints."""
    text = instruction.rest
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return _rings(re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)))
    if mesh := _MESH.search(text):
        return _mesh_groups(mesh)
    start = text.find("replica_groups=")
    if start < 0:
        return [tuple(range(devices))]
    text = text[start + len("replica_groups="):]
    if text.startswith("{}"):
        return [tuple(range(devices))]
    if text.startswith("{{"):
        body = text[:text.index("}}") + 2]
        return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", body)]
    if iota := _IOTA.match(text):
        rows = [int(n) for n in iota.group(1).split(",")]
        ids = _iota(iota.group(2), iota.group(3), int(np.prod(rows)))
        return [tuple(map(int, row)) for row in ids.reshape(rows[0], -1)]
    return [tuple(range(devices))]


def _mesh_groups(found: re.Match) -> list[tuple[int, ...]]:
    """mesh['a'=4,'b'=2], device_ids=(...) {'b','a':(1)2}: of axis a the sub-axis of size 2 that
    begins after the sizes whose product is 1."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
    asked = [(name, int(before or 1), int(size or axes[name])) for name, before, size
             in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(4)) if name in axes]
    dims: list[tuple[str, int, int]] = []  # (axis, product of the sizes before it, size)
    for name, whole in axes.items():
        cuts = {1, whole} | {edge for axis, before, size in asked if axis == name
                             for edge in (before, before * size)}
        edges = sorted(cuts)
        dims += [(name, low, high // low) for low, high in itertools.pairwise(edges)] or [
            (name, 1, 1)]
    shape = [size for _, _, size in dims]
    ids = _iota(found.group(2), found.group(3), int(np.prod(shape))).reshape(shape)
    chosen = [i for name, before, size in asked for i, (axis, low, count) in enumerate(dims)
              if axis == name and before <= low and low * count <= before * size]
    others = [i for i in range(len(shape)) if i not in chosen]
    size = int(np.prod([shape[i] for i in chosen]))
    return [tuple(map(int, row)) for row in ids.transpose(others + chosen).reshape(-1, size)]


def _iota(sizes: str | None, order: str | None, count: int) -> np.ndarray:
    ids = np.arange(count)
    if sizes:
        ids = ids.reshape([int(n) for n in sizes.split(",")])
    if order:
        ids = ids.transpose([int(n) for n in order.split(",")])
    return ids.reshape(-1)


def _rings(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, ...]]:
    """Source-target pairs -> the sets of devices that they connect."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        parent.setdefault(x, x)
        while parent[x] != x:
            x = parent[x]
        return x

    for a, b in pairs:
        parent[root(int(a))] = root(int(b))
    members: dict[int, list[int]] = {}
    for x in parent:
        members.setdefault(root(x), []).append(x)
    return [tuple(sorted(m)) for m in members.values()]


def _axis_groups(mesh_shape: Mapping[str, int]) -> list[tuple[str, frozenset]]:
    """Every combination of axes with the groups it makes, few axes first."""
    names = [name for name, size in mesh_shape.items() if size > 1]
    shape = [mesh_shape[name] for name in names]
    ids = np.arange(int(np.prod(shape))).reshape(shape)
    out = []
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), count):
            others = [i for i in range(len(names)) if i not in chosen]
            size = int(np.prod([shape[i] for i in chosen]))
            rows = ids.transpose([*others, *chosen]).reshape(-1, size)
            out.append(("+".join(names[i] for i in chosen),
                        frozenset(frozenset(map(int, row)) for row in rows)))
    return out


def _axes(groups: Sequence[tuple[int, ...]], known: Sequence[tuple[str, frozenset]],
          kind: str) -> str:
    have = {frozenset(group) for group in groups}
    for name, wanted in known:
        if have == wanted:
            return name
    for name, wanted in known:  # a permute along part of an axis (no wrap-around, halves)
        if all(any(group <= other for other in wanted) for group in have):
            return name
    return "?"
