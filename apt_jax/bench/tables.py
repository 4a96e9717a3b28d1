"""Whether a compiled program makes a table of scores: an array of queries times keys.

A kernel keeps scores in registers; plain attention writes them. The size alone does not tell a table:
an image has fewer tokens than an MLP has channels, so weights and activations are larger, and a ring
makes a part of the table at a time. What tells it is two dimensions, one of queries and one of keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from apt_jax.plan.hlo import Array, Instruction, Program
from apt_jax.plan.programs import sample_shape, text_length

Pair = tuple[int, int]
# Hands on what is there, or is the program's input.
HANDED = ("parameter", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call",
          "conditional", "partition-id", "opt-barrier")
# Counts from here on are known though padded to tiles or joined with heads or samples; where one is
# smaller, both are looked for as they are: another dimension may be as large by chance.
LARGE = 1024
TILES = (2, 8, 64, 128, 256, 512)
PADDING = 1 / 32  # of a count, at most


def made(program: Program) -> Iterator[tuple[Instruction, Array]]:
    """The arrays that a program writes to memory: no inputs, no insides of fusions, and no scratch
    space of a library (bytes in a row)."""
    inside = {i.called["calls"] for body in program.computations.values() for i in body
              if i.opcode == "fusion" and "calls" in i.called}
    for name in dict.fromkeys(name for name, _ in program.walk()):
        if name in inside:
            continue
        for instruction in program.computations[name]:
            if instruction.opcode.startswith(HANDED):
                continue
            yield from ((instruction, array) for array in instruction.result
                        if not (array.dtype in ("u8", "s8") and len(array.shape) == 1))


def _is(size: int, count: int) -> bool:
    """Whether a dimension of `size` may be `count` tokens, padded, of some heads or samples."""
    padded = {-(-count // tile) * tile for tile in (1, *TILES)}
    return any(size and size % each == 0 for each in padded if each <= (1 + PADDING) * count)


def is_table(shape: Sequence[int], pair: Pair) -> bool:
    """Whether an array holds the scores of so many queries and keys, in any order of dimensions."""
    alike = _is if min(pair) >= LARGE else int.__eq__
    return any(alike(one, pair[0]) and alike(other, pair[1])
               for one, other in itertools.permutations(shape, 2))


def tables(program: Program, pairs: Iterable[Pair]) -> list[str]:
    """"fusion.7 f32[24,4352,4352]" of every table of scores that the program makes."""
    pairs = list(pairs)
    return [f"{instruction.name} {array.dtype}{list(array.shape)}".replace(" [", "[")
            for instruction, array in made(program)
            if any(is_table(array.shape, pair) for pair in pairs)]


def pairs_of(config: Any) -> tuple[Pair, ...]:
    """(queries, keys) of every attention of config.model on one device: of the whole sequence, and
    of each part of it that a device of the context axis may hold."""
    ways = max(1, config.mesh.context)
    sides = zip(sample_shape(config)[:3], config.model.patch, strict=True)
    video, text = 1, text_length(config)
    for side, patch in sides:
        video *= side // patch

    def parts(*streams: int) -> set[int]:
        whole = sum(-(-count // ways) * ways for count in streams)  # each is filled up to the ways
        return {sum(streams)} | {whole // n for n in range(1, ways + 1) if ways % n == 0}

    if config.model.family == "wan":
        own = parts(video)
        cross = {(count, config.model.text_tokens or text) for count in own}
    else:
        own, cross = parts(text, video), set()
    return tuple(sorted(set(itertools.product(own, own)) | cross))
