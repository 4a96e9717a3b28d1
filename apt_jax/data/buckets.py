"""Which shape a sample gets: at preparation by its own size, at training by the run's wishes."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence

from apt_jax.errors import UserError


def parse_size(text: str) -> tuple[int, int]:
    """'96x64' (width x height, in pixels) -> (height, width) = (64, 96)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if not match or not all(map(int, match.groups())):
        raise UserError(f"{text!r} is no size; write WIDTHxHEIGHT in pixels, for example 96x64")
    return int(match[2]), int(match[1])


def choose_size(
    height: int, width: int, sizes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The (height, width) of `sizes` with the nearest aspect ratio (in log scale).

    Among equal aspects the largest that needs no enlarging wins, else the smallest.
    """
    aspect = math.log(width / height)

    def cost(size: tuple[int, int]) -> tuple:
        h, w = size
        enlarged = h > height or w > width
        return round(abs(math.log(w / h) - aspect), 9), enlarged, h * w if enlarged else -h * w

    return min(sizes, key=cost)


def choose_frames(available: int, counts: Sequence[int]) -> int | None:
    """The largest count that a clip of `available` frames fills, or None if it fills none."""
    return max((c for c in counts if c <= available), default=None)


def even_frames(available: int, count: int, stride: int = 1) -> list[int]:
    """`count` frame numbers spread evenly over every `stride`-th of `available` frames.

    even_frames(8, 4) is [0, 2, 4, 6]. Needs count <= ceil(available / stride).
    """
    usable = -(-available // stride)
    if not 1 <= count <= usable:
        raise ValueError(f"{count} frames from {usable}")
    return [stride * (i * usable // count) for i in range(count)]


def crop_box(height: int, width: int, to_height: int, to_width: int) -> tuple[float, ...]:
    """The largest centred box (left, top, right, bottom) with the aspect of the target."""
    scale = min(height / to_height, width / to_width)
    h, w = min(height, to_height * scale), min(width, to_width * scale)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def choose_split(group: str, holdout: float) -> str:
    """'holdout' for about that part of all groups, by a hash of the group's name; else 'train'."""
    return "holdout" if _place(group) < holdout * 2**64 else "train"


def last_held_out(groups: Iterable[str]) -> str:
    """The group that `choose_split` keeps in 'train' the longest as holdout grows."""
    return max(groups, key=_place)


def _place(group: str) -> int:
    digest = hashlib.sha256(b"apt_jax split:" + group.encode()).digest()
    return int.from_bytes(digest[:8], "big")
