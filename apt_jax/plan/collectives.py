"""The collectives of a compiled program: kind, bytes, mesh axis, how often, hidden or exposed."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from apt_jax.plan.hlo import Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")
# What keeps a device busy while a transfer runs: products, kernels, loops, convolutions.
_HEAVY_TARGETS = re.compile(r"gemm|cublas|cudnn|triton|mosaic|pallas|tpu_custom_call", re.I)
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
      dtype: of what travels (the first array of several).
      bytes: of the whole result (all-gather), the whole input (reduce-scatter) or the array.
      wire: bytes that each device sends, on a ring.
      times: runs per call of the program.
      overlapped: True when heavy work is scheduled between its start and its end.
      in_loop: True for steady-state traffic inside a loop over layers or microbatches.
      members: device numbers of the first group.
    """

    name: str
    kind: str
    axes: str
    group: int
    dtype: str
    bytes: int
    wire: float
    times: float
    overlapped: bool
    in_loop: bool
    members: tuple[int, ...] = ()


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program compiled for a mesh of these axis sizes (row-major ids)."""
    groups_of_axes = _axis_groups(mesh_shape)
    found = []
    for computation, times in program.walk():
        instructions = program.computations[computation]
        for position, instruction in enumerate(instructions):
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            done = None
            if instruction.opcode.endswith("-start"):
                done = _done(instructions, position)
            if kind == "all-reduce" and "all-reduce-scatter" in computation:
                kind = "reduce-scatter"  # how TPUs spell it: a fusion that keeps one slice
            members = _groups(instruction, int(np.prod(list(mesh_shape.values()))))
            size = max((len(g) for g in members), default=1)
            arrays = (instructions[done] if done is not None else instruction).result
            arrays = [a for a in arrays if a.dtype not in ("u32", "s32") or len(arrays) == 1]
            total = sum(a.bytes for a in arrays)
            if kind == "collective-permute" and done is None and len(arrays) > 1:
                total //= 2
            scatter_input = kind == "reduce-scatter" and instruction.opcode != "all-reduce"
            total = total * size if scatter_input else total
            found.append(Collective(
                instruction.name, kind, _axes(members, groups_of_axes, kind), size,
                arrays[0].dtype if arrays else "?", total, _wire(kind, total, size), times,
                done is not None and _busy(instructions[position + 1:done]), times > 1,
                members[0] if members else ()))
    return found


def _wire(kind: str, size: int, group: int) -> float:
    if kind == "collective-permute":
        return float(size)
    share = (group - 1) / group if group else 0.0
    return size * share * (2.0 if kind == "all-reduce" else 1.0)


def _done(instructions: Sequence[Instruction], start: int) -> int | None:
    name = instructions[start].name
    for i in range(start + 1, len(instructions)):
        if instructions[i].opcode.endswith("-done") and name in instructions[i].operand_names:
            return i
    return None


def _busy(between: Sequence[Instruction]) -> bool:
    for instruction in between:
        if instruction.opcode in ("dot", "convolution", "while", "call"):
            return True
        if instruction.opcode == "custom-call" and _HEAVY_TARGETS.search(instruction.rest):
            return True
        if instruction.opcode == "fusion" and (
                "kind=kOutput" in instruction.rest or _HEAVY_TARGETS.search(instruction.rest)):
            return True
    return False


# -- which devices talk to each other


def _groups(instruction: Instruction, devices: int) -> list[tuple[int, ...]]:
    """The device groups of an instruction, in any of the notations that XLA prints."""
    text = instruction.rest
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return _rings(re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)))
    if mesh := _MESH.search(text):
        names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", mesh.group(1)), strict=True)
        shape = [int(n) for n in sizes]
        ids = _iota(mesh.group(2), mesh.group(3), int(np.prod(shape))).reshape(shape)
        chosen = [names.index(n) for n in re.findall(r"'([^']+)'", mesh.group(4)) if n in names]
        others = [i for i in range(len(shape)) if i not in chosen]
        size = int(np.prod([shape[i] for i in chosen]))
        return [tuple(map(int, row)) for row in ids.transpose(others + chosen).reshape(-1, size)]
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
