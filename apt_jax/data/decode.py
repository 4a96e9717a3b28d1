"""Open one media file: how long and large it is, and chosen frames of it as RGB.

Images and animations (png, jpg, webp, gif) go through Pillow, which also composes animated WebP
and GIF frames rightly; videos (mp4, webm, mov, mkv) go through PyAV. A file is a path or, from an
archive, a `Member` or a `Blob`. Frames are chosen by number here and by time in `resample`.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from apt_jax.data.buckets import crop_box

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv")
MEDIA = PICTURES + VIDEOS
# Pictures and videos too, but not read: such a file is listed and not passed over as a stranger.
UNREAD = (".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".avi", ".m4v", ".wmv",
          ".flv", ".mpg", ".mpeg")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclasses.dataclass(frozen=True)
class Media:
    """What a file holds: frames (1 = an image), size as displayed, frames a second (0 = image; the
    average where they change), and how many seconds a moving one lasts."""

    frames: int
    height: int
    width: int
    fps: float
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Blob:
    """A media file in memory; its name only tells the format."""

    name: str
    data: bytes

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    def open(self) -> io.BufferedIOBase:
        return io.BytesIO(self.data)


@dataclasses.dataclass(frozen=True)
class Member:
    """A media file that is `size` bytes of another file, from `offset` on; read as needed."""

    name: str
    path: pathlib.Path
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    def open(self) -> io.BufferedIOBase:
        return io.BufferedReader(_Window(self.path, self.offset, self.size))


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: pathlib.Path, offset: int, size: int):
        self._file, self._offset, self._size, self._at = open(path, "rb"), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._offset + self._at)
        count = max(0, min(len(buffer), self._size - self._at))
        done = self._file.readinto(memoryview(buffer)[:count])
        self._at += done
        return done

    def close(self) -> None:
        self._file.close()
        super().close()


File = pathlib.Path | Blob | Member


def opened(file: File) -> str | io.BufferedIOBase:
    """What Pillow and PyAV can open."""
    return str(file) if isinstance(file, pathlib.Path) else file.open()


def open_video(file: File):
    """PyAV's container. Tags that are not UTF-8, as in many files, are no reason to refuse it."""
    import av

    # From version 19 on it replaces what is not UTF-8 by itself, and has no such argument.
    old = int(av.__version__.partition(".")[0]) < 19
    return av.open(opened(file), **({"metadata_errors": "replace"} if old else {}))


def bytes_of(file: File) -> int:
    """Bytes of the media themselves."""
    if isinstance(file, pathlib.Path):
        return file.stat().st_size
    return len(file.data) if isinstance(file, Blob) else file.size


def read_through(file: File) -> None:
    """Read every byte. OSError where the disk fails, which a decoder may take for the end."""
    with open(file, "rb") if isinstance(file, pathlib.Path) else file.open() as stream:
        while stream.read(2**20):
            pass


def is_video(file: File) -> bool:
    """Whether PyAV reads it (by its name)."""
    return file.suffix.lower() in VIDEOS


def probe(path: File) -> Media:
    """Look at a file without decoding more than it must: of an animation all frames, each has a
    duration of its own. Raises whatever the decoder raises."""
    media = _probe_video(path) if is_video(path) else _probe_picture(path)
    if min(media.frames, media.height, media.width) < 1:
        raise ValueError(f"{media.frames} frames of {media.width}x{media.height}: nothing to see")
    return media


def read(
    path: File,
    wanted: Sequence[int],
    height: int,
    width: int,
    background: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """Frames number `wanted` (ascending), cropped to the aspect and resized with antialias.

    Returns uint8 [len(wanted), height, width, 3]; transparency is laid over `background`; EXIF
    orientation and video rotation are applied. ValueError if the file has fewer frames.
    """
    frames = _read_video(path, wanted) if is_video(path) else read_picture(
        path, wanted, background
    )
    fitted = [fit(frame, height, width) for frame in frames]
    if len(fitted) < len(wanted):
        raise ValueError(f"only {len(fitted)} of {len(wanted)} chosen frames could be decoded")
    return np.stack(fitted)


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Centre crop to the target's aspect and resize with antialias -> uint8 [height, width, 3]."""
    if (image.height, image.width) != (height, width):
        box = crop_box(image.height, image.width, height, width)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB, with transparency laid over the background.

    Deep grey values (16 bits) become 8 bits, 65,535 white; ValueError where they are outside it.
    """
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        under = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(under, image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as L, or LA where a value stands for transparency.

    Pillow's own conversion cuts values off at 255, which makes nearly all of them white.
    """
    values = np.asarray(image)
    if image.mode == "F" or values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError(f"pixels of mode {image.mode} that are not 16-bit grey; save it with 8 or "
                         "16 bits a channel")
    grey = Image.fromarray(np.rint(values / 257.0).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _probe_picture(path: File) -> Media:
    with Image.open(opened(path), formats=_FORMATS) as image:
        frames = len(_numbers(image))
        width, height = image.size
        if frames == 1:
            if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # stored on its side
                width, height = height, width
            return Media(1, height, width, 0.0)
        milliseconds = sum(_durations(image))
        return Media(frames, height, width, 1000.0 * frames / milliseconds, milliseconds / 1000)


def _numbers(image: Image.Image) -> range:
    """The frames of an image or animation among all pictures of its file.

    A JPEG may hold a preview or the other eye's picture, a PNG a still for those who do not animate.
    """
    if image.format == "MPO":
        return range(1)
    return range(bool(image.info.get("default_image")), getattr(image, "n_frames", 1))


def frame_times(file: File) -> np.ndarray:
    """When each frame of an animation begins, and the last one ends: seconds, float64 [frames + 1].

    [0, 0] for an image. Raises what the decoder raises where a frame is damaged.
    """
    with Image.open(opened(file), formats=_FORMATS) as image:
        still = len(_numbers(image)) == 1
        return np.cumsum([0.0] + ([0.0] if still else _durations(image))) / 1000


def _durations(image: Image.Image) -> list[float]:
    """Milliseconds of each frame of an animation; 0 stands for 100, as for browsers.

    A frame says how long it stays only once it is loaded; so a file that is cut short is found, too.
    """
    found = []
    for number in _numbers(image):
        image.seek(number)
        image.load()
        found.append(image.info.get("duration") or 100)
    return found


def read_picture(path: File, wanted: Sequence[int], background):
    """Frames number `wanted` of an image or animation, RGB, as long as there are any."""
    with Image.open(opened(path), formats=_FORMATS) as image:
        numbers = _numbers(image)
        if len(numbers) == 1:
            yield from (flatten(ImageOps.exif_transpose(image), background) for _ in wanted[:1])
            return
        for number in wanted:
            try:
                image.seek(number + numbers.start)
            except EOFError:
                return
            yield flatten(image, background)


def _probe_video(path: File) -> Media:
    with open_video(path) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError("no frame could be decoded")
        height, width = first.height, round(first.width * _stretch(stream))
        if round(getattr(first, "rotation", 0) or 0) % 180:
            height, width = width, height
        rate = stream.average_rate or stream.guessed_rate or 25
        rate = float(rate)
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
    # What a file says of its frames and length may be nothing (webm, mkv), those of its first fragment,
    # or those too that it hides; packets are frames for the codecs in use.
    with open_video(path) as container:
        stream = container.streams.video[0]
        packets = [(p.pts, p.duration or 0) for p in container.demux(stream)
                   if p.size and not p.is_discard]
        times = [(start, start + long) for start, long in packets if start is not None]
        if times:
            seconds = float((max(end for _, end in times) - min(times)[0]) * stream.time_base)
    frames = len(packets)
    if seconds and not 0.9 < frames / seconds / rate < 1.1:  # the rate changes, or is not what it says
        rate = frames / seconds
    return Media(frames, height, width, rate, seconds or frames / rate)


def _read_video(path: pathlib.Path, wanted: Sequence[int]):
    left = list(wanted)
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if not left:
                return
            if number == left[0]:
                left.pop(0)
                yield rgb(frame, stream)


def _stretch(stream) -> float:
    """How much wider than high the pixels of a video are shown."""
    ratio = float(stream.sample_aspect_ratio or 1)
    return ratio if 0.1 < ratio < 10 else 1.0


def rgb(frame, stream) -> Image.Image:
    """A PyAV frame as it is shown: its colours, its pixels' shape, turned as its metadata say.

    Files that do not say are BT.709 from 720 lines on and BT.601 below, as players take them.
    """
    matrix = "ITU709" if frame.colorspace == 2 and frame.height >= 720 else None
    image = Image.fromarray(frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray())
    if (stretch := _stretch(stream)) != 1:
        image = image.resize((round(image.width * stretch), image.height),
                             Image.Resampling.LANCZOS)
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(image), turns)))
