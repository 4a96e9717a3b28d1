"""manifest.json: what a data set holds. Read strictly: anything unexpected is one clear line.

    {"format": "apt_jax data set", "version": 1, "name": "emoji",
     "text": {"encoder": "all-MiniLM-L6-v2", "width": 384, "max_tokens": 64,
              "null": {"prompt": "", "tokens": 2, "values": base64 int8, "scales": base64 float32},
              "negative": null or the same of a negative prompt},
     "splits": {"train": 2081, "holdout": 521},
     "buckets": [{"split": "train", "frames": 1, "height": 64, "width": 64, "records": 1494,
                  "shards": [{"file": "...", "records": 512, "bytes": 1, "sha256": "..."}]}],
     "skipped": 0, "notices": ["NOTICE"],
     "made": {what apt-jax prepare was asked for, and the hash of its input}}

Version 2 is a data set of latents. Its buckets have, besides, "kind": "latents", "channels" and
"pixels": [frames, height, width] that the VAE was given (frames, height and width are those of the
latents); its text has "dtype": "bfloat16" or "int8", and for bfloat16 the scales are null.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import pathlib
import re

import ml_dtypes
import numpy as np

from apt_jax.data.quantise import TEXT_DTYPES, dequantise
from apt_jax.errors import UserError

FILE = "manifest.json"
FORMAT = "apt_jax data set"
VERSION = 1  # pixels
LATENT_VERSION = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file beside the manifest."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Records of one split and one stored shape; a record's number runs through its shards.

    kind: "pixels" or "latents". pixels: frames, height, width before the VAE, () without one.
    """

    split: str
    frames: int
    height: int
    width: int
    records: int
    shards: tuple[Shard, ...]
    kind: str = "pixels"
    channels: int = 3
    pixels: tuple[int, ...] = ()

    def to_json(self) -> dict:
        value = dataclasses.asdict(self)
        if self.kind == "pixels":
            for key in _LATENT_KEYS:
                del value[key]
        return value


_LATENT_KEYS = ("kind", "channels", "pixels")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A fixed caption with its states as stored: values int8 [tokens, D] and scales float32
    [tokens], or values bfloat16 and scales None."""

    prompt: str
    values: np.ndarray
    scales: np.ndarray | None

    def states(self) -> np.ndarray:
        """float32 [tokens, D]."""
        return dequantise(self.values, self.scales)

    def to_json(self) -> dict:
        return {
            "prompt": self.prompt,
            "tokens": len(self.values),
            "values": _base64(self.values),
            "scales": None if self.scales is None else _base64(np.asarray(self.scales, "<f4")),
        }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The whole manifest; `null` stands for a dropped caption, `negative` is optional."""

    name: str
    encoder: str
    text_width: int
    max_tokens: int
    null: Prompt
    negative: Prompt | None
    splits: dict[str, int]
    buckets: tuple[Bucket, ...]
    skipped: int
    notices: tuple[str, ...]
    made: dict
    text_dtype: str = "int8"

    @property
    def kind(self) -> str:
        """"pixels" or "latents": one for the whole data set."""
        return self.buckets[0].kind

    def dumps(self) -> str:
        """JSON text with a final newline; the same manifest gives the same bytes."""
        latents = self.kind == "latents"
        value = {
            "format": FORMAT,
            "version": LATENT_VERSION if latents else VERSION,
            "name": self.name,
            "text": {
                "encoder": self.encoder,
                "width": self.text_width,
                "max_tokens": self.max_tokens,
                **({"dtype": self.text_dtype} if latents else {}),
                "null": self.null.to_json(),
                "negative": self.negative.to_json() if self.negative else None,
            },
            "splits": self.splits,
            "buckets": [b.to_json() for b in self.buckets],
            "skipped": self.skipped,
            "notices": list(self.notices),
            "made": self.made,
        }
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def load(folder: str | pathlib.Path, check_hashes: bool = False) -> Manifest:
    """Read and check FOLDER/manifest.json and that its shards are there with the right sizes.

    check_hashes reads every shard too. UserError for anything wrong.
    """
    folder = pathlib.Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no data set ({FILE} is missing); make one with apt-jax prepare"
        )
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); prepare the data set anew") from None
    manifest = parse(value, str(path))
    for shard in (s for b in manifest.buckets for s in b.shards):
        _check_file(folder / shard.file, shard, check_hashes)
    return manifest


def file_hash(path: pathlib.Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(value: object, where: str = FILE) -> Manifest:
    """Check a decoded manifest and turn it into a Manifest; UserError names the first fault."""
    top = _Node(value, where)
    top.keys("format", "version", "name", "text", "splits", "buckets", "skipped", "notices",
             "made")
    if top.text("format") != FORMAT:
        raise top.fault("format", f"must be {FORMAT!r}")
    version = top.count("version")
    if version not in (VERSION, LATENT_VERSION):
        raise top.fault("version", f"must be {VERSION} (pixels) or {LATENT_VERSION} (latents); "
                                   "prepare the data set with this version")
    latents = version == LATENT_VERSION
    text = top.node("text")
    text.keys("encoder", "width", "max_tokens", "null", "negative", *["dtype"] * latents)
    width, dtype = text.count("width", 1), text.text("dtype") if latents else "int8"
    if dtype not in TEXT_DTYPES:
        raise text.fault("dtype", f"must be one of {', '.join(TEXT_DTYPES)}")
    negative = (None if text.value["negative"] is None
                else _prompt(text.node("negative"), width, dtype))

    buckets, files = [], set()
    for node in top.nodes("buckets"):
        node.keys("split", "frames", "height", "width", "records", "shards",
                  *_LATENT_KEYS * latents)
        shards = []
        for item in node.nodes("shards"):
            item.keys("file", "records", "bytes", "sha256")
            shard = Shard(
                item.text("file", _NAME), item.count("records", 1), item.count("bytes", 1),
                item.text("sha256", re.compile(r"[0-9a-f]{64}")),
            )
            if shard.file in files:
                raise item.fault("file", "is listed twice")
            files.add(shard.file)
            shards.append(shard)
        bucket = Bucket(
            node.text("split", _NAME), *(node.count(k, 1) for k in ("frames", "height", "width")),
            node.count("records", 1), tuple(shards), *(_latent_keys(node) if latents else ()),
        )
        if bucket.records != sum(s.records for s in shards):
            raise node.fault("records", "is not the sum of its shards")
        if any(_key(bucket) == _key(other) for other in buckets):
            raise node.fault("split", "repeats the shape of another bucket")
        buckets.append(bucket)

    splits = top.node("splits")
    counts = {k: splits.count(k) for k in splits.value}
    for name in {b.split for b in buckets} | set(counts):
        if counts.get(name) != sum(b.records for b in buckets if b.split == name):
            raise top.fault("splits", f"disagrees with the buckets of split {name!r}")
    notices = top.value["notices"]
    if not isinstance(notices, list) or not all(isinstance(n, str) for n in notices):
        raise top.fault("notices", "must be a list of strings")
    return Manifest(
        name=top.text("name"), encoder=text.text("encoder"), text_width=width,
        max_tokens=text.count("max_tokens", 1), null=_prompt(text.node("null"), width, dtype),
        negative=negative, splits=counts, buckets=tuple(buckets), skipped=top.count("skipped"),
        notices=tuple(notices), made=top.node("made").value, text_dtype=dtype,
    )


def _latent_keys(node: _Node) -> tuple[str, int, tuple[int, ...]]:
    """kind, channels, pixels of a bucket of latents."""
    pixels = node.value["pixels"]
    if not (isinstance(pixels, list) and len(pixels) == 3
            and all(type(n) is int and n > 0 for n in pixels)):
        raise node.fault("pixels", "must be [frames, height, width]")
    if node.text("kind") != "latents":
        raise node.fault("kind", "must be 'latents' in a version 2 data set")
    return "latents", node.count("channels", 1), tuple(pixels)


def _key(bucket: Bucket) -> tuple:
    return bucket.split, bucket.frames, bucket.height, bucket.width


def _prompt(node: _Node, width: int, dtype: str) -> Prompt:
    node.keys("prompt", "tokens", "values", "scales")
    tokens = node.count("tokens", 1)
    stored = np.dtype(np.int8 if dtype == "int8" else ml_dtypes.bfloat16)
    values = node.data("values", stored, tokens * width).reshape(tokens, width)
    if dtype != "int8":
        if node.value["scales"] is not None or not np.isfinite(values.astype(np.float32)).all():
            raise node.fault("values", "must be finite, with scales null")
        return Prompt(node.text("prompt"), values, None)
    scales = node.data("scales", np.dtype("<f4"), tokens)
    if not np.isfinite(scales).all():
        raise node.fault("scales", "must be finite")
    return Prompt(node.text("prompt"), values, scales)


def _check_file(path: pathlib.Path, shard: Shard, check_hash: bool) -> None:
    mend = "copy the data set again or prepare it anew"
    if not path.is_file():
        raise UserError(f"shard {path} is missing; {mend}")
    if path.stat().st_size != shard.bytes:
        raise UserError(f"shard {path} has {path.stat().st_size} bytes, not {shard.bytes}; {mend}")
    if check_hash and file_hash(path) != shard.sha256:
        raise UserError(f"shard {path} has another sha256 than the manifest says; {mend}")


@dataclasses.dataclass(frozen=True)
class _Node:
    """A JSON value with the place it came from, for messages."""

    value: object
    where: str

    def fault(self, key: str, what: str) -> UserError:
        return UserError(f"{self.where}: {key!r} {what}; mend the manifest or prepare it anew")

    def keys(self, *names: str) -> None:
        have = set(self.value) if isinstance(self.value, dict) else None
        if have is None:
            raise UserError(f"{self.where}: must be a JSON object; prepare the data set anew")
        for name in sorted(set(names) ^ have):
            raise self.fault(name, "is missing" if name in names else "is not a known key")

    def text(self, key: str, pattern: re.Pattern | None = None) -> str:
        value = self.value[key]
        if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
            raise self.fault(key, f"is not allowed: {str(value)[:60]!r}")
        return value

    def count(self, key: str, low: int = 0) -> int:
        value = self.value[key]
        if type(value) is not int or value < low:
            raise self.fault(key, f"must be a whole number from {low}, got {str(value)[:60]!r}")
        return value

    def data(self, key: str, dtype: np.dtype, size: int) -> np.ndarray:
        try:
            raw = base64.b64decode(self.text(key), validate=True)
        except (binascii.Error, ValueError):
            raise self.fault(key, "is not base64") from None
        if len(raw) != size * dtype.itemsize:
            raise self.fault(key, f"holds {len(raw)} bytes, not {size * dtype.itemsize}")
        return np.frombuffer(raw, dtype)

    def node(self, key: str) -> _Node:
        value = self.value[key]
        if not isinstance(value, dict):
            raise self.fault(key, "must be a JSON object")
        return _Node(value, f"{self.where}: {key}")

    def nodes(self, key: str) -> list[_Node]:
        value = self.value[key]
        if not isinstance(value, list) or not value:
            raise self.fault(key, "must be a list that is not empty")
        found = [_Node(v, f"{self.where}: {key}[{i}]") for i, v in enumerate(value)]
        if not all(isinstance(v, dict) for v in value):
            raise self.fault(key, "must hold JSON objects")
        return found
