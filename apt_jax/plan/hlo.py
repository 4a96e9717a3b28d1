"""The compiled program as text: computations, instructions, trip counts of loops.

Only what planning needs is read. The text is XLA's own (compiler.py), scheduled, so
the order of lines in a computation is the order in which a device starts them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e8m0fnu": 8,
}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)="
                     r"%?([\w.\-]+)")
_INNER = re.compile(r"\bcalled_computations=\{%?([\w.\-]+)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
# Names of the Python source, which may hold any word: never to be taken for what the program does.
_METADATA = re.compile(r',? ?\bmetadata=\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * ITEM_BITS.get(self.dtype, 0) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `rest` follows the operands, but for `metadata`: attributes, backend config."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: str
    rest: str
    is_root: bool
    metadata: str = ""

    @property
    def operand_names(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)

    @property
    def called(self) -> dict[str, str]:
        """attribute -> computation, for the attributes that name one."""
        return dict(_CALLED.findall(self.rest))

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.result)


@dataclasses.dataclass
class Program:
    """All computations of a module by name, and the name of the entry."""

    computations: dict[str, list[Instruction]]
    entry: str

    def wrapped(self, instruction: Instruction) -> Instruction | None:
        """The one instruction that an async-start runs; None for others and for a longer body.

        What a TPU gives to its sparse cores is wrapped once more, in a custom call.
        """
        if instruction.opcode != "async-start":
            return None
        inner = self._only(instruction.called.get("calls", ""))
        while inner is not None and (called := _INNER.search(inner.rest)):
            inner = self._only(called.group(1))
        return inner

    def _only(self, computation: str) -> Instruction | None:
        body = [i for i in self.computations.get(computation, ())
                if i.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast")]
        return body[0] if len(body) == 1 else None

    def walk(self) -> Iterator[tuple[str, float]]:
        """Every computation that runs with how often it does, per call of the program.

        A computation reached from two places comes twice. Loops without a known trip count and
        without a constant bound count once. What an async-start wraps counts as the start itself.
        """
        stack = [(self.entry, 1.0)]
        while stack:
            name, times = stack.pop()
            yield name, times
            for instruction in self.computations[name]:
                stack += [(n, times * k) for n, k in self.children(instruction)]

    def children(self, instruction: Instruction) -> list[tuple[str, float]]:
        """The computations that an instruction runs, and how often."""
        called = instruction.called
        if self.wrapped(instruction) is not None:
            return []
        if instruction.opcode == "while":
            trips = self.trip_count(instruction)
            return [(called[key], trips) for key in ("body", "condition") if key in called]
        names = [called[key] for key in ("calls", "true_computation", "false_computation")
                 if key in called]
        names += _INNER.findall(instruction.rest)
        if instruction.opcode == "call" and "to_apply" in called:
            names.append(called["to_apply"])
        if branches := _BRANCHES.search(instruction.rest):
            names += re.findall(r"%?([\w.\-]+)", branches.group(1))
        return [(name, 1.0) for name in names if name in self.computations]

    def trip_count(self, loop: Instruction) -> float:
        """How often a while loop runs: XLA's note, else the bound its condition compares with,
        written there or among the loop's first values."""
        if found := _TRIPS.search(loop.rest):
            return float(found.group(1))
        bounds = []
        todo = [loop.called["condition"]]
        while todo:
            for instruction in self.computations.get(todo.pop(), ()):
                todo += [name for key, name in instruction.called.items() if key == "calls"]
                bounds += self._integer(instruction)
                if instruction.opcode == "get-tuple-element":
                    index = int(_INDEX.search(instruction.rest).group(1))
                    bounds += self._first_value(loop, index)
        return float(max(bounds, default=1)) or 1.0

    @functools.cached_property
    def _named(self) -> dict[str, Instruction]:
        return {i.name: i for body in self.computations.values() for i in body}

    def _first_value(self, loop: Instruction, index: int) -> list[int]:
        """[the integer with which element `index` of a loop's state begins], [] for all else."""
        state = self._named.get(loop.operand_names[0])
        if state is None or state.opcode != "tuple":
            return []
        found = self._named.get(state.operand_names[index])
        while found is not None and found.opcode in ("copy", "bitcast", "opt-barrier"):
            found = self._named.get(found.operand_names[0])
        return self._integer(found) if found is not None else []

    @staticmethod
    def _integer(instruction: Instruction) -> list[int]:
        if instruction.opcode == "constant" and instruction.result[0].dtype == "s32":
            if re.fullmatch(r"-?\d+", instruction.operands.strip()):
                return [int(instruction.operands)]
        return []


def is_whole(text: str) -> bool:
    """Whether a module's text has its end: the entry is its last computation."""
    return "\nENTRY " in text and text.rstrip().endswith("\n}")


def parse_hlo(text: str) -> Program:
    """Parse a module's text. ValueError where it has no entry computation or ends inside one."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header.group(2), [])
                if header.group(1):
                    entry = header.group(2)
        elif line.startswith("}") and not line.startswith("}}"):  # attributes of TPU kernels wrap
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.append(instruction)
    if not entry:
        raise ValueError("this text is no HLO module: it has no ENTRY computation")
    if current is not None:
        raise ValueError("this text is no whole HLO module: it ends inside a computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if head is None:
        return None
    rest = line[head.end():]
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.find(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, after = rest.partition("(")
    close = _closing(rest, len(opcode))
    operands, after, metadata = rest[len(opcode) + 1:close], rest[close + 1:], ""
    if found := _METADATA.search(after):
        metadata = found.group(1)
        after = after[:found.start()] + after[found.end():]
    return Instruction(head.group(2), opcode.strip(), _arrays(result), operands, after,
                       bool(head.group(1)), metadata)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start` (strings are skipped)."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        c = text[i]
        if c == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
            if depth == 0:
                return i
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n))
        for dtype, sizes in _ARRAY.findall(text) if dtype in ITEM_BITS)
