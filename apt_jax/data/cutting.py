"""From what a file holds to what becomes of it: split, bucket, and the frames that are taken.

For latents the rule is: resample the clip to the wanted rate; take the longest wanted length that
it fills; divide the clip into as many equal parts as full windows fit (at most `clips`), and take
one window from the middle of each part. No frame is in two windows. A clip that fills only the
length 1 gives one image, its middle frame.
"""

from __future__ import annotations

import dataclasses

from apt_jax.data.buckets import (
    choose_frames,
    choose_size,
    choose_split,
    even_frames,
    last_held_out,
)
from apt_jax.data.settings import Settings
from apt_jax.data.sources import Item

_SLACK = 1e-3  # frames: a duration in a file is rounded


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one file, or one window of it, becomes.

    bucket: split, frames, height, width in pixels. Pixels take the frames number `wanted`; latents
    take frames from second `start` on at `fps` (0: an image).
    """

    item: Item
    bucket: tuple[str, int, int, int]
    wanted: tuple[int, ...]
    fps: float
    start: float = 0.0


def plan_pixels(item: Item, row: dict, settings: Settings) -> list[Plan] | str:
    """The one plan of a probed file, or the reason why it fits no bucket."""
    total, rate = row["frames"], row["fps"]
    step = 1.0
    if settings.sampling == "consecutive" and 0 < settings.fps < rate:
        step = rate / settings.fps
    available = max(1, int(total / step))
    count = choose_frames(available, settings.frames)
    if count is None:
        return _too_short(available, settings)
    if settings.sampling == "even":
        wanted = even_frames(total, count)
        fps = rate * count / total
    else:
        start = (available - count) // 2
        wanted = [int((start + i) * step) for i in range(count)]
        fps = rate / step
    height, width = choose_size(row["height"], row["width"], settings.sizes)
    split = choose_split(item.group, settings.holdout)
    return [Plan(item, (split, count, height, width), tuple(wanted), fps if count > 1 else 0.0)]


def plan_latents(item: Item, row: dict, settings: Settings) -> list[Plan] | str:
    """The plans of a probed file's windows, or the reason why there is none."""
    seconds, rate = row["seconds"], row["fps"]
    moving = row["frames"] > 1 and seconds > 0
    if moving and rate < settings.min_fps:
        return f"{rate:.3g} frames a second are fewer than min_fps = {settings.min_fps:g}"
    wanted_rate = settings.fps or rate
    available = max(1, int(seconds * wanted_rate + _SLACK)) if moving else 1
    count = choose_frames(available, settings.frames)
    if count is None:
        return _too_short(available, settings)
    sizes = settings.image_sizes or settings.sizes if count == 1 else settings.sizes
    height, width = choose_size(row["height"], row["width"], sizes)
    grow = max(height / row["height"], width / row["width"])
    if settings.max_enlarge and grow > settings.max_enlarge:
        return (f"{row['width']}x{row['height']} would be enlarged {grow:.2f} times to "
                f"{width}x{height} (max_enlarge = {settings.max_enlarge:g})")
    bucket = (choose_split(item.group, settings.holdout), count, height, width)
    if not moving:
        return [Plan(item, bucket, (), 0.0)]
    if settings.sampling == "even":
        wanted_rate, starts = count / seconds, [0]
    else:
        # A picture that stands for hours is not cut into thousands of windows.
        most = min(settings.clips or row["frames"], row["frames"]) if count > 1 else 1
        starts = windows(available, count, most)
    return [Plan(item, bucket, (), wanted_rate if count > 1 else 0.0, start / wanted_rate)
            for start in starts]


def some_train(plans: list[Plan]) -> list[Plan]:
    """The plans with one group moved to 'train' where all would be held out, as of few files."""
    if not plans or any(plan.bucket[0] == "train" for plan in plans):
        return plans
    group = last_held_out(plan.item.group for plan in plans)
    return [dataclasses.replace(plan, bucket=("train", *plan.bucket[1:]))
            if plan.item.group == group else plan for plan in plans]


def windows(available: int, count: int, most: int = 0) -> list[int]:
    """First frames of the windows: one of `count` frames in the middle of each of equal parts.

    There are as many parts as full windows fit in `available` frames, at most `most` (0: all).
    windows(100, 49) is [1, 51]; windows(100, 49, 1) is [26].
    """
    number = available // count
    number = min(number, most) if most else number
    return [(2 * i + 1) * available // (2 * number) - count // 2 for i in range(number)]


def _too_short(available: int, settings: Settings) -> str:
    return f"{available} frames are fewer than the shortest clip ({min(settings.frames)})"
