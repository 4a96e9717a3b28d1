"""One sample as bytes, and ArrayRecord shards of them.

Layout of a record, little endian (no pickle, readable in a page of any language):

    magic b"APTR" | version uint8 | header length uint32 | header: UTF-8 JSON
    text values int8 [tokens, width] | text scales float32 [tokens] | picture: one WebP

The header holds frames, height, width, fps, caption, source, group, tokens, text_width. A clip is
one WebP with its frames tiled from top to bottom, then in further columns where WebP's limit of
16,383 pixels asks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import struct
import uuid
from collections.abc import Iterable

import numpy as np
from PIL import Image

from apt_jax.data.quantise import dequantise
from apt_jax.errors import UserError

MAGIC = b"APTR"
VERSION = 1
HEAD = struct.Struct("<4sBI")
_WEBP_LIMIT = 16383
_MOST_PIXELS = 2 * 89_478_485  # beyond, Pillow takes a picture for an attack
_KEYS = ("frames", "height", "width", "fps", "caption", "source", "group", "tokens", "text_width")


@dataclasses.dataclass(frozen=True)
class Record:
    """One captioned image or clip.

    picture is the encoded WebP; text_values int8 [tokens, text_width] and text_scales float32
    [tokens] are the quantised states of the caption's tokens. fps is 0 for an image. source names
    the file it was made from; records of one group are always in the same split.
    """

    frames: int
    height: int
    width: int
    fps: float
    caption: str
    source: str
    group: str
    text_values: np.ndarray
    text_scales: np.ndarray
    picture: bytes

    @property
    def tokens(self) -> int:
        """Stored token states of the caption."""
        return len(self.text_scales)

    def decode(self) -> np.ndarray:
        """The frames, uint8 [F, H, W, 3]."""
        return decode_frames(self.picture, self.frames, self.height, self.width)

    def text(self) -> np.ndarray:
        """The states of the caption's tokens, float32 [tokens, text_width]."""
        return dequantise(self.text_values, self.text_scales)


def _columns(frames: int, height: int) -> tuple[int, int]:
    rows = min(frames, max(1, _WEBP_LIMIT // height))
    return rows, -(-frames // rows)


def check_size(frames: int, height: int, width: int) -> None:
    """UserError where such a clip does not fit one WebP, or one that Pillow reads again."""
    rows, columns = _columns(frames, height)
    if (height > _WEBP_LIMIT or columns * width > _WEBP_LIMIT
            or rows * height * columns * width > _MOST_PIXELS):
        raise UserError(
            f"{frames} frames of {width}x{height} do not fit one WebP ({_WEBP_LIMIT} pixels a "
            f"side, {_MOST_PIXELS:,} in all); prepare smaller or shorter clips, or latents (--vae)"
        )


def encode_frames(frames: np.ndarray, quality: int = 90) -> bytes:
    """uint8 [F, H, W, 3] -> one WebP of the tiled frames (method 6; the same bytes every time).

    The clip is one that `check_size` lets through.
    """
    f, h, w, _ = frames.shape
    rows, columns = _columns(f, h)
    tiled = np.zeros((rows * columns, h, w, 3), np.uint8)
    tiled[:f] = frames
    tiled = tiled.reshape(columns, rows * h, w, 3).transpose(1, 0, 2, 3)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(tiled.reshape(rows * h, columns * w, 3))).save(
        out, "WEBP", quality=quality, method=6
    )
    return out.getvalue()


def decode_frames(picture: bytes, frames: int, height: int, width: int) -> np.ndarray:
    """The inverse of `encode_frames` up to WebP's loss; ValueError if the size disagrees."""
    try:
        with Image.open(io.BytesIO(picture), formats=("WEBP",)) as image:
            array = np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    rows, columns = _columns(frames, height)
    if array.shape != (rows * height, columns * width, 3):
        raise ValueError(f"picture {array.shape} is not {frames} frames of {height}x{width}")
    tiles = array.reshape(rows * height, columns, width, 3).transpose(1, 0, 2, 3)
    return tiles.reshape(rows * columns, height, width, 3)[:frames]


def pack(record: Record) -> bytes:
    """Record -> bytes."""
    tokens, text_width = record.text_values.shape
    values = {k: getattr(record, k) for k in _KEYS[:-2]} | {
        "tokens": tokens,
        "text_width": text_width,
    }
    header = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join(
        (
            HEAD.pack(MAGIC, VERSION, len(header)),
            header,
            np.ascontiguousarray(record.text_values, np.int8).tobytes(),
            np.ascontiguousarray(record.text_scales, "<f4").tobytes(),
            record.picture,
        )
    )


def read_head(data: bytes, version: int, keys: Iterable[str]) -> tuple[dict, int]:
    """The header of a record of this version with exactly these keys, and where its data start.

    ValueError that says what is wrong when the bytes are no such record.
    """
    if len(data) < HEAD.size:
        raise ValueError("a record shorter than its head")
    magic, found, length = HEAD.unpack_from(data)
    if magic != MAGIC or found != version:
        raise ValueError(f"not a version {version} record: {magic!r} version {found}")
    start = HEAD.size + length
    header = json.loads(data[HEAD.size : start])
    if sorted(header) != sorted(keys):
        raise ValueError(f"record header has keys {sorted(header)}")
    return header, start


def unpack(data: bytes) -> Record:
    """Bytes -> Record; ValueError that says what is wrong when they are no record."""
    header, start = read_head(data, VERSION, _KEYS)
    tokens, width = header.pop("tokens"), header.pop("text_width")
    middle, end = start + tokens * width, start + tokens * (width + 4)
    if end > len(data):
        raise ValueError("a record cut short")
    return Record(
        **header,
        text_values=np.frombuffer(data, np.int8, tokens * width, start).reshape(tokens, width),
        text_scales=np.frombuffer(data, "<f4", tokens, middle),
        picture=data[end:],
    )


def write_shard(path: str | os.PathLike, records: Iterable[bytes]) -> int:
    """Write records into one ArrayRecord file, appearing whole or not at all; returns the count.

    OSError where the disk is full or cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = pathlib.Path(path)
    # A name of its own: a worker that was given up may still be writing the same shard.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    # One record a group: any record is read alone. WebP does not shrink further.
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    count = 0
    try:
        try:
            for record in records:
                with _disk_errors(path):
                    writer.write(record)
                count += 1
        finally:
            with _disk_errors(path):
                writer.close()
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return count


def sync(path: pathlib.Path) -> None:
    """Onto the disk: what is renamed after this is whole even when the power fails."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def is_whole(path: pathlib.Path, size: int, records: int) -> bool:
    """Whether a shard has this size, opens, and holds this many records."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        if path.stat().st_size != size:
            return False
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records() == records
        finally:
            reader.close()
    except (OSError, RuntimeError):  # the reader's own words for damage
        return False


@contextlib.contextmanager
def _disk_errors(path: pathlib.Path):
    """What the writer raises as the OSError that it was."""
    try:
        yield
    except RuntimeError as error:
        code = disk_error_in(error) or errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def disk_error_in(error: Exception) -> int:
    """The errno that an error of ArrayRecord's names by its words; 0 for other words, of damage."""
    text = str(error)
    return next((code for code in errno.errorcode if os.strerror(code) in text), 0)
