"""How much of each collective the work beside it hides: a model of the compiled schedule.

A device is taken for queues, one of work and one per set of mesh axes for transfers, that run the
instructions in the order in which XLA scheduled them. An asynchronous transfer begins at its start
(or when the link is free) and whoever reads its result waits at its done; the wait is exposed. So a
transfer beside a small fusion is hidden by that fusion's time and no more. The times are rates from
data sheets times stated efficiencies: good for shares and for ranking, not for promises.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from apt_jax.plan.chips import Chip
from apt_jax.plan.hlo import Array, Instruction, Program

# Part of the peak that today's kernels reach on an H100 (700, 690, 492 of 989 TFLOP/s, published);
# taken for every chip. The backward pass does 2 of 3 parts of a training step's attention.
MATMUL_EFFICIENCY = 0.71
ATTENTION_EFFICIENCY = {"inference": 0.70, "training": 0.54}

_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all",
    "partition-id", "replica-id", "copy-start", "copy-done", "async-update", "opt-barrier"})
_CONTRACTING = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\[{]([\d,"\s]*)[\]}]')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_KERNELS = re.compile(r"triton|pallas|mosaic|tpu_custom_call|fmha|cudnn", re.I)
# Products of a kernel beside the two of a forward pass, in its name.
_KERNEL_WORK = ((re.compile(r"dkv", re.I), 2.0), (re.compile(r"_dq|dq_", re.I), 1.5),
                (re.compile(r"backward|_bwd", re.I), 2.5))


def link_rate(members: Sequence[int], chip: Chip) -> float:
    """Bytes/s that a device of a collective among these devices can send.

    Inside a host (or a TPU slice) the fast network; between hosts every member of a group brings
    its own port, so members that share a host add up, never beyond the fast network.
    """
    if not chip.host_devices or not members:
        return chip.fast
    hosts: dict[int, int] = defaultdict(int)
    for member in members:
        hosts[member // chip.host_devices] += 1
    if len(hosts) == 1:
        return chip.fast
    return min(chip.fast, chip.slow * max(hosts.values()))


class Timeline:
    """Plays a program; `exposed` then has the seconds of one run of every collective that waits.

    Args:
      transfers: (computation, name of the start or the whole) -> (link, seconds).
      starts: (computation, name of a done) -> name of its start.
    """

    def __init__(self, program: Program, chip: Chip,
                 transfers: Mapping[tuple[str, str], tuple[str, float]],
                 starts: Mapping[tuple[str, str], str]):
        self.program, self.chip = program, chip
        self.transfers, self.starts = transfers, starts
        self._asynchronous = {(where, start) for (where, _), start in starts.items()}
        self.exposed: dict[tuple[str, str], float] = {}
        self._lengths: dict[str, float] = {}
        self._work: dict[str, float] = {}
        self.seconds = self._play(program.entry)

    def _play(self, name: str) -> float:
        """Seconds from the first to the last instruction of a computation."""
        if name in self._lengths:
            return self._lengths[name]
        self._lengths[name] = 0.0  # a computation never calls itself
        now, free, ends = 0.0, defaultdict(float), {}
        shapes = {i.name: i.result for i in self.program.computations[name]}
        for instruction in self.program.computations[name]:
            key = (name, instruction.name)
            if key in self.transfers:
                link, seconds = self.transfers[key]
                end = max(now, free[link]) + seconds
                free[link] = ends[instruction.name] = end
                if key in self._asynchronous:
                    continue
                self.exposed[key], now = end - now, end
            elif key in self.starts:
                start = self.starts[key]
                wait = max(0.0, ends.get(start, 0.0) - now)
                self.exposed[name, start] = wait
                now += wait
            else:
                now += self._seconds(instruction, shapes)
        self._lengths[name] = now
        return now

    def _seconds(self, instruction: Instruction, shapes: Mapping[str, tuple[Array, ...]]) -> float:
        called = instruction.called
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-start", "-done")):
            return 0.0
        if instruction.opcode == "while":
            return self.program.trip_count(instruction) * self._play(called["body"])
        if instruction.opcode in ("call", "conditional"):
            return max((self._play(n) for n, _ in self.program.children(instruction)), default=0.0)
        if instruction.opcode == "fusion" and "calls" in called:
            # On TPUs a collective may lie in a fusion: its transfer is played there.
            return max(self._fused(called["calls"]), self._traffic(instruction, shapes))
        return max(self._products(instruction, shapes), self._traffic(instruction, shapes))

    def _fused(self, name: str) -> float:
        """Seconds of the products and the transfers in a fused computation."""
        if name not in self._work:
            self._work[name] = 0.0
            body = self.program.computations.get(name, ())
            shapes = {i.name: i.result for i in body}
            total = 0.0
            for i in body:
                if (name, i.name) in self.transfers:
                    self.exposed[name, i.name] = self.transfers[name, i.name][1]
                    total += self.exposed[name, i.name]
                elif i.opcode == "fusion" and "calls" in i.called:
                    total += self._fused(i.called["calls"])
                else:
                    total += self._products(i, shapes)
            self._work[name] = total
        return self._work[name]

    def _products(self, instruction: Instruction,
                  shapes: Mapping[str, tuple[Array, ...]]) -> float:
        operands = [shapes[n][0] for n in instruction.operand_names if shapes.get(n)]
        if not operands or not instruction.result:
            return 0.0
        return (products(instruction, operands) / (self.chip.flops * MATMUL_EFFICIENCY)
                + attention(instruction, operands)
                / (self.chip.flops * ATTENTION_EFFICIENCY["training"]))

    def _traffic(self, instruction: Instruction,
                 shapes: Mapping[str, tuple[Array, ...]]) -> float:
        """Seconds to write the result and read the operands; of operands that are sliced, and of
        results that are written in place, the size is not known: as if nothing was moved."""
        inner = self.program.computations.get(instruction.called.get("calls", ""), ())
        body = (instruction, *inner)
        if any(i.opcode == "dynamic-update-slice" for i in body):
            return 0.0
        moved = instruction.bytes
        if not any(i.opcode in ("dynamic-slice", "gather") for i in body):
            moved += sum(a.bytes for n in instruction.operand_names for a in shapes.get(n, ()))
        return moved / self.chip.bandwidth


def products(instruction: Instruction, operands: Sequence[Array]) -> float:
    """FLOPs of a dot, a convolution (TPUs write products as such) or a call of cuBLAS."""
    size = math.prod(instruction.result[0].shape)
    if instruction.opcode == "convolution" and len(operands) > 1:
        labels = _LABELS.search(instruction.rest)
        if labels is None:
            return 0.0
        return 2.0 * size * math.prod(
            n for label, n in zip(labels.group(1), operands[1].shape, strict=False) if label != "o")
    if instruction.opcode == "dot" or "__cublas" in instruction.rest:
        found = _CONTRACTING.search(instruction.rest)
        digits = re.findall(r"\d+", found.group(1)) if found else []
        return 2.0 * size * math.prod(operands[0].shape[int(d)] for d in digits) if digits else 0.0
    return 0.0


def attention(instruction: Instruction, operands: Sequence[Array]) -> float:
    """FLOPs of an attention kernel by the shapes of its queries and keys (its first two operands
    with a token and a head axis), 0 for another one. The longest side is the tokens."""
    if instruction.opcode != "custom-call" or not _KERNELS.search(instruction.rest):
        return 0.0
    arrays = [a.shape for a in operands if len(a.shape) >= 3 and "f" in a.dtype][:3]
    if len(arrays) < 3:
        return 0.0
    named = instruction.rest + instruction.metadata
    factor = next((work for pattern, work in _KERNEL_WORK if pattern.search(named)), 1.0)
    return 4.0 * math.prod(arrays[0]) * max(arrays[1]) * factor

