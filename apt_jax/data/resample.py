"""Frames of a clip at a chosen rate: at time t the frame that is on screen at t.

Times, not frame numbers, so that files of any rate, also a changing one, come out at the same
speed: a faster file loses frames and a slower one repeats some.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from apt_jax.data import decode

_SEEK_FROM = 2.0  # seconds: a clip that begins earlier is reached by decoding from the start
# A container may round times (mkv: to ms); a frame counts as on screen this part of a period early.
_EARLY = 0.1


def read_clip(
    file: decode.File,
    start: float,
    rate: float,
    count: int,
    height: int,
    width: int,
    background: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """`count` frames from second `start` on, `rate` a second, cropped and resized as in `decode`.

    Returns uint8 [count, height, width, 3]. ValueError if the file ends before the clip does.
    """
    times = start + np.arange(count) / rate if rate else np.array([start])
    images = _video(file, times) if decode.is_video(file) else _picture(file, times, background)
    frames, last, fitted = [], None, None
    for image in images:
        if image is not last:  # a repeated frame is resized once
            last, fitted = image, decode.fit(image, height, width)
        frames.append(fitted)
    if len(frames) < count:
        raise ValueError(f"ends after {len(frames)} of {count} frames of the clip at {start:.2f} s")
    return np.stack(frames)


def _picture(file, times: np.ndarray, background) -> Iterator[Image.Image]:
    known = decode.frame_times(file)
    if len(known) == 2:
        yield from decode.read_picture(file, [0], background)
        return
    early = _EARLY * np.diff(known).min()  # of the shortest, so that none is passed over
    numbers = (np.searchsorted(known[:-1] - early, times, side="right") - 1).tolist()
    distinct = sorted(set(numbers))
    found = dict(zip(distinct, decode.read_picture(file, distinct, background)))
    for number in numbers:
        if number not in found:
            return
        yield found[number]


def _video(file, times: np.ndarray) -> Iterator[Image.Image]:
    with decode.open_video(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        period = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        begin = float((stream.start_time or 0) * stream.time_base)
        frames = _from(container, stream, begin, times[0])
        yield from _on_screen(frames, [begin + t for t in times], period, stream)


def _from(container, stream, begin: float, start: float) -> Iterator:
    """Decoded frames from at or before second `start` on."""
    if start < _SEEK_FROM:
        yield from container.decode(stream)
        return
    container.seek(int((begin + start) / stream.time_base), stream=stream, backward=True)
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None or first.time is None or first.time > begin + start:
        container.seek(stream.start_time or 0, stream=stream, backward=True)  # no usable index
        frames, first = container.decode(stream), None
    if first is not None:
        yield first
    yield from frames


def _on_screen(frames: Iterator, times: list[float], period: float, stream
               ) -> Iterator[Image.Image]:
    """For each of the ascending times the last frame shown by then; the last of all stays as long as
    it says, or one period."""
    left, held, image = list(times), None, None
    for frame in frames:
        if frame.time is None:
            raise ValueError("a frame without a time")
        while left and held is not None and frame.time > left[0] + _EARLY * period:
            image = image or decode.rgb(held, stream)
            yield image
            left.pop(0)
        if not left:
            return
        held, image = frame, None
    if held is None:
        return
    stays = max(period, float((held.duration or 0) * held.time_base))
    while left and left[0] < held.time + stays + _EARLY * period:
        image = image or decode.rgb(held, stream)
        yield image
        left.pop(0)
