"""Choice of sizes, clip lengths, frames and splits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.data.buckets import (
    choose_frames,
    choose_size,
    choose_split,
    crop_box,
    even_frames,
    parse_size,
)
from apt_jax.errors import UserError

sides = st.integers(1, 2000)
sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=6)


@given(sides, sides, sizes)
def test_the_chosen_size_has_the_nearest_aspect(height, width, offered):
    h, w = choose_size(height, width, offered)
    assert (h, w) in offered

    def distance(h, w):
        return abs(math.log(w / h) - math.log(width / height))

    assert distance(h, w) <= min(distance(*s) for s in offered) + 1e-8


def test_equal_aspects_take_the_largest_without_enlarging():
    offered = [(32, 32), (64, 64), (128, 128)]
    assert choose_size(100, 100, offered) == (64, 64)
    assert choose_size(20, 20, offered) == (32, 32)
    assert choose_size(500, 500, offered) == (128, 128)
    assert choose_size(100, 200, [(64, 64), (64, 96), (96, 64)]) == (64, 96)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 8))
def test_even_frames_are_ascending_and_inside(available, count, stride):
    if count > -(-available // stride):
        with pytest.raises(ValueError):
            even_frames(available, count, stride)
        return
    found = even_frames(available, count, stride)
    assert len(set(found)) == len(found) == count
    assert found == sorted(found) and found[0] == 0 and found[-1] < available
    assert all(n % stride == 0 for n in found)


def test_even_frames_examples():
    assert even_frames(8, 4) == [0, 2, 4, 6]
    assert even_frames(8, 8) == list(range(8))
    assert even_frames(8, 2, stride=2) == [0, 4]
    assert even_frames(1, 1) == [0]


@given(st.integers(1, 100), st.lists(st.integers(1, 100), min_size=1, max_size=5))
def test_clips_go_to_the_next_lower_length(available, counts):
    found = choose_frames(available, counts)
    fitting = [c for c in counts if c <= available]
    assert found == (max(fitting) if fitting else None)


@given(sides, sides, sides, sides)
def test_crop_box_is_inside_centred_and_has_the_aspect(height, width, to_height, to_width):
    left, top, right, bottom = crop_box(height, width, to_height, to_width)
    assert -1e-6 <= left <= right <= width + 1e-6 and -1e-6 <= top <= bottom <= height + 1e-6
    assert left == pytest.approx(width - right, abs=1e-6)
    assert top == pytest.approx(height - bottom, abs=1e-6)
    assert (right - left) * to_height == pytest.approx((bottom - top) * to_width, rel=1e-6)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


def test_split_is_by_group_and_has_its_part():
    names = [f"group {i}" for i in range(4000)]
    part = sum(choose_split(n, 0.2) == "holdout" for n in names) / len(names)
    assert abs(part - 0.2) < 0.02
    assert {choose_split(n, 0.0) for n in names} == {"train"}
    smaller = {n for n in names if choose_split(n, 0.1) == "holdout"}
    assert all(choose_split(n, 0.2) == "holdout" for n in smaller)


def test_parse_size():
    assert parse_size("96x64") == (64, 96)
    for wrong in ("64", "64x", "axb", "0x64", "00x64", "64x000", "-4x8", "64x64x3"):
        with pytest.raises(UserError, match="WIDTHxHEIGHT"):
            parse_size(wrong)
