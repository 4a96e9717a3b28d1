"""A table of key patterns between our parameters and another library's, strict both ways.

A rule names one of our leaves and the tensors that make it. Three things differ between the two
sides, and a rule says them all:

  layout   a torch Linear stores [out, in], ours [in, out]; convolutions likewise
  joining  our qkv kernel is [q | k | v] along the last axis; theirs are three tensors
  stacking equal blocks are numbered there; ours are one leaf with a leading depth axis

`{layer}` in a name of theirs is the index on our leading axis. Any other `{word}` stands in both
names for one path component, the same in both.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from apt_jax.errors import UserError

Shape = tuple[int, ...]
LAYER = "{layer}"


class Layout(NamedTuple):
    """Their tensor, reshaped to `view`, axes permuted, reshaped again, is ours.

    their_shape: our shape (of one layer and one part) -> their shape.
    axes: the permutation; None for none.
    view: our shape -> the shape whose axes are permuted; None where that is their shape.
    """

    their_shape: Callable[[Shape], Shape]
    axes: tuple[int, ...] | None = None
    view: Callable[[Shape], Shape] | None = None

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """[their shape] -> [our shape]; a copy only where the axes are permuted."""
        bits = _bits(theirs)
        if self.axes is not None:
            bits = bits.reshape((self.view or self.their_shape)(shape)).transpose(self.axes)
        return np.ascontiguousarray(bits).reshape(shape).view(theirs.dtype)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The inverse."""
        shape, bits = self.their_shape(ours.shape), _bits(ours)
        if self.axes is not None:
            view = (self.view or self.their_shape)(ours.shape)
            bits = bits.reshape([view[a] for a in self.axes]).transpose(np.argsort(self.axes))
        return np.ascontiguousarray(bits).reshape(shape).view(ours.dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    """x as unsigned integers of its size: numpy moves those fast, bfloat16 one by one."""
    return x.view(f"u{x.itemsize}")


SAME = Layout(lambda s: s)
LINEAR = Layout(lambda s: (s[1], s[0]), (1, 0))
CONV2 = Layout(lambda s: (s[3], s[2], *s[:2]), (2, 3, 1, 0))  # [O, I, kh, kw] <-> [kh, kw, I, O]
CONV3 = Layout(lambda s: (s[4], s[3], *s[:3]), (2, 3, 4, 1, 0))


def patch_conv(patch: Sequence[int]) -> Layout:
    """A Conv3d whose stride is its kernel, [D, C, *patch] <-> [C * patch, D] on tokens."""
    size = math.prod(patch)
    return Layout(lambda s: (s[1], s[0] // size, *patch), (1, 2, 3, 4, 0))


def channel_last_patch(patch: Sequence[int]) -> tuple[Layout, Layout]:
    """An output layer whose tokens are [patch, C] there and [C, patch] here: kernel and bias."""
    size = math.prod(patch)
    return (Layout(lambda s: (s[1], s[0]), (2, 1, 0), lambda s: (size, s[1] // size, s[0])),
            Layout(lambda s: s, (1, 0), lambda s: (size, s[0] // size)))


def padded(before: int = 0, after: int = 0) -> Layout:
    """[...] <-> [1, ..., 1]: `before` and `after` axes of size 1 there, none here."""
    return Layout(lambda s: (1,) * before + s + (1,) * after)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our leaves ("a/b/kernel") and the tensors that make it, joined along the last axis."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        return LAYER in self.theirs[0]


def linear(ours: str, *theirs: str, bias: bool = True, layout: Layout = LINEAR) -> list[Rule]:
    """The rules of a dense layer or convolution: kernel and, unless bias is False, bias."""
    rules = [Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), layout)]
    if bias:
        rules.append(Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs)))
    return rules


def scale(ours: str, theirs: str, layout: Layout = SAME, name: str = "weight") -> list[Rule]:
    """The rule of a norm's scale."""
    return [Rule(f"{ours}/scale", (f"{theirs}.{name}",), layout)]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our leaves and where it comes from.

    parts: the names of one layer, joined along the last axis: [layers][parts]; one row if the leaf
    is not stacked.
    """

    name: str
    shape: Shape
    stacked: bool
    parts: tuple[tuple[str, ...], ...]
    layout: Layout

    @property
    def layer_shape(self) -> Shape:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def part_shape(self) -> Shape:
        *lead, last = self.layer_shape
        return (*lead, last // len(self.parts[0]))

    @property
    def their_shape(self) -> Shape:
        return self.layout.their_shape(self.part_shape)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensors of one layer -> that layer of ours."""
        ours = [self.layout.to_ours(part, self.part_shape) for part in parts]
        if len(ours) == 1:
            return ours[0]
        return np.concatenate([_bits(x) for x in ours], axis=-1).view(ours[0].dtype)

    def split(self, layer: np.ndarray) -> list[np.ndarray]:
        """One layer of ours -> their tensors."""
        pieces = np.split(layer, len(self.parts[0]), axis=-1)
        return [self.layout.to_theirs(np.ascontiguousarray(piece)) for piece in pieces]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table applied to a network: every leaf, and every name and shape of theirs.

    aliases: names of theirs that may be there as equal copies of another (tied weights).
    """

    leaves: dict[str, Leaf]
    theirs: dict[str, Shape]
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)

    def choosing(self, found: Iterable[str]) -> Plan:
        """The plan with the name of each tied tensor that `found` has, where it has only one."""
        found = set(found)
        swap = {name: alias for alias, name in self.aliases.items()
                if name not in found and alias in found}
        if not swap:
            return self
        leaves = {key: dataclasses.replace(leaf, parts=tuple(
            tuple(swap.get(part, part) for part in row) for row in leaf.parts))
            for key, leaf in self.leaves.items()}
        return Plan(leaves, {swap.get(n, n): shape for n, shape in self.theirs.items()},
                    {a: n for a, n in self.aliases.items() if n not in swap})

    def check(self, found: Mapping[str, Shape], source: str) -> None:
        """UserError naming the first tensor of `found` that is missing, unknown or misshapen."""
        for problem, names in (("lacks", set(self.theirs) - set(found)),
                               ("has the unknown", set(found) - set(self.theirs)
                                - set(self.aliases))):
            if names:
                first = min(names, key=_natural)
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{source} {problem} tensor {first}{more}; it is not the model its "
                                "config.json describes, take the weights and config of one "
                                "checkpoint")
        for name in sorted(found, key=_natural):
            want = self.theirs[self.aliases.get(name, name)]
            if tuple(found[name]) != want:
                raise UserError(f"{source}: tensor {name} is {tuple(found[name])}, its config.json "
                                f"makes it {want}; take the weights and config of one checkpoint")


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def make_plan(rules: Iterable[Rule], shapes: Mapping[str, Shape],
              aliases: Mapping[str, str] | None = None) -> Plan:
    """Applies a table to our leaves; ValueError where the table does not fit the network.

    Args:
      rules: the table.
      shapes: {"a/b/kernel": shape} of every leaf of our network.
      aliases: {tied name: name that is in the table}.
    """
    patterns = [(_pattern(rule.ours), rule) for rule in rules]
    used: set[int] = set()
    leaves: dict[str, Leaf] = {}
    theirs: dict[str, Shape] = {}
    for name, shape in shapes.items():
        hits = [(i, match, rule) for i, (pattern, rule) in enumerate(patterns)
                if (match := pattern.fullmatch(name))]
        if len(hits) != 1:
            raise ValueError(f"our parameter {name} matches {len(hits)} rules of the table")
        index, match, rule = hits[0]
        used.add(index)
        layers = range(shape[0]) if rule.stacked else (None,)
        if shape[-1] % len(rule.theirs):
            raise ValueError(f"our parameter {name} {shape} is not made of {len(rule.theirs)} "
                             "equal parts")
        parts = tuple(tuple(part.format(layer=layer, **match.groupdict()) for part in rule.theirs)
                      for layer in layers)
        leaf = Leaf(name, tuple(shape), rule.stacked, parts, rule.layout)
        leaves[name] = leaf
        for part in (part for row in parts for part in row):
            if part in theirs:
                raise ValueError(f"the table takes {part} twice")
            theirs[part] = leaf.their_shape
    idle = [rule.ours for i, (_, rule) in enumerate(patterns) if i not in used]
    if idle:
        raise ValueError(f"rules of the table that match nothing: {idle}")
    return Plan(leaves, theirs, dict(aliases or {}))


def _pattern(ours: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", ours)
    return re.compile("".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>[^/]+)"
                              for i, part in enumerate(parts)))
