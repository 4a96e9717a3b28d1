"""One sample of a latent data set as bytes: bfloat16 latents and the caption's trimmed states.

Layout, little endian (the head is that of `records`, with version 2):

    magic b"APTR" | version uint8 = 2 | header length uint32 | header: UTF-8 JSON
    text values [tokens, text_width] | text scales float32 [tokens] (int8 only)
    latents bfloat16 [frames, height, width, channels]

The header's frames, height, width and channels are those of the latents; `start` is the second of
the source at which the clip begins, `fps` the rate after resampling (0 for an image).
"""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np

from apt_jax.data.quantise import TEXT_DTYPES, dequantise
from apt_jax.data.records import HEAD, MAGIC, read_head

VERSION = 2
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_KEYS = ("frames", "height", "width", "channels", "fps", "start", "caption", "source", "group",
         "tokens", "text_width", "text_dtype")
_PLAIN = ("fps", "start", "caption", "source", "group")


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """One captioned image or clip in the VAE's space.

    values: bfloat16 [F, H, W, C], normalised as the VAE encoder gives them. text_values: bfloat16
    or int8 [tokens, text_width], with text_scales float32 [tokens] for int8 and None else.
    """

    fps: float
    start: float
    caption: str
    source: str
    group: str
    text_values: np.ndarray
    text_scales: np.ndarray | None
    values: np.ndarray

    @property
    def frames(self) -> int:
        """Latent frames."""
        return self.values.shape[0]

    @property
    def tokens(self) -> int:
        """Stored token states of the caption."""
        return len(self.text_values)

    def text(self) -> np.ndarray:
        """The states of the caption's tokens, float32 [tokens, text_width]."""
        return dequantise(self.text_values, self.text_scales)


def pack(record: LatentRecord) -> bytes:
    """LatentRecord -> bytes."""
    frames, height, width, channels = record.values.shape
    tokens, text_width = record.text_values.shape
    kind = record.text_values.dtype.name
    if kind not in TEXT_DTYPES or (kind == "int8") != (record.text_scales is not None):
        raise ValueError(f"text states of dtype {kind}, scales {record.text_scales is not None}")
    values = {"frames": frames, "height": height, "width": width, "channels": channels}
    values |= {key: getattr(record, key) for key in _PLAIN}
    values |= {"tokens": tokens, "text_width": text_width, "text_dtype": kind}
    header = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    scales = b"" if record.text_scales is None else (
        np.ascontiguousarray(record.text_scales, "<f4").tobytes())
    return b"".join((
        HEAD.pack(MAGIC, VERSION, len(header)), header,
        np.ascontiguousarray(record.text_values).tobytes(), scales,
        np.ascontiguousarray(record.values, BFLOAT16).tobytes(),
    ))


def unpack(data: bytes) -> LatentRecord:
    """Bytes -> LatentRecord; ValueError that says what is wrong when they are no such record."""
    header, start = read_head(data, VERSION, _KEYS)
    if header["text_dtype"] not in TEXT_DTYPES:
        raise ValueError(f"record header has text_dtype {header['text_dtype']!r}")
    tokens, width = header["tokens"], header["text_width"]
    quantised = header["text_dtype"] == "int8"
    kind = np.dtype(np.int8) if quantised else BFLOAT16
    shape = tuple(header[key] for key in ("frames", "height", "width", "channels"))
    middle = start + tokens * width * kind.itemsize
    end = middle + (4 * tokens if quantised else 0)
    if len(data) - end != int(np.prod(shape)) * BFLOAT16.itemsize:
        raise ValueError("a record of the wrong length")
    return LatentRecord(
        **{key: header[key] for key in _PLAIN},
        text_values=np.frombuffer(data, kind, tokens * width, start).reshape(tokens, width),
        text_scales=np.frombuffer(data, "<f4", tokens, middle) if quantised else None,
        values=np.frombuffer(data, BFLOAT16, -1, end).reshape(shape),
    )
