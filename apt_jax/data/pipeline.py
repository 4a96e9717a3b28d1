"""From shards to batches: open a data set in the shapes of a run, read it in planned order.

    dataset = open_dataset("bundled:emoji", "train", frames=(1, 4), height=16, width=16)
    for batch in batches(dataset, batch_size=64, seed=0, start_step=step): ...

Reading, threads and prefetch are grain's. Its worker processes are not used: they refuse another
worker count on restore and fail where absl's flags are not parsed (notebooks); decoding is in C
and releases the interpreter lock.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from apt_jax.data import latent_records
from apt_jax.data import manifest as manifests
from apt_jax.data import records as record_files
from apt_jax.data.buckets import choose_frames, even_frames
from apt_jax.data.bundled import resolve
from apt_jax.data.decode import fit
from apt_jax.data.plan import PADDING, Plan, dropped_captions
from apt_jax.data.quantise import pad_states
from apt_jax.errors import UserError

log = logging.getLogger("apt_jax")

CACHE_BYTES = 512 * 2**20
_LAST_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a run's samples: frames, height, width (of the latents where it reads those).
    """

    frames: int
    height: int
    width: int


class Dataset:
    """One split in the shapes of a run. Record numbers run from 0 to records - 1.

    Attributes: records (count), shapes (the run's buckets), members (record numbers of each
    shape), null_text float32 [L, D] and null_mask bool [L] (states of the empty caption),
    negative_text / negative_mask (of the negative prompt; the null states if there is none),
    text_width, max_text_tokens, caption_dropout, manifest, path, kind ("pixels" or "latents"),
    channels (3, or those of the latents).
    """

    def __init__(self, path, manifest, split, sources, frame_stride, max_text_tokens,
                 caption_dropout):
        import grain

        self.path, self.manifest, self.split = path, manifest, split
        self.text_width = manifest.text_width
        self.kind, self.channels = manifest.kind, manifest.buckets[0].channels
        self.max_text_tokens = max_text_tokens
        self.caption_dropout = caption_dropout
        self.null_text, self.null_mask = pad_states(manifest.null.states(), max_text_tokens)
        negative = manifest.negative or manifest.null
        self.negative_text, self.negative_mask = pad_states(negative.states(), max_text_tokens)
        self._stride = frame_stride

        self.shapes = sorted({s for _, s in sources}, key=dataclasses.astuple)
        self._shape = np.repeat(
            [self.shapes.index(s) for _, s in sources], [b.records for b, _ in sources]
        )
        self.records = len(self._shape)
        self.members = tuple(np.flatnonzero(self._shape == i) for i in range(len(self.shapes)))
        files = [str(path / shard.file) for b, _ in sources for shard in b.shards]
        self._reader = grain.sources.ArrayRecordDataSource(files)
        if len(self._reader) != self.records:
            raise UserError(
                f"{path}: its shards hold {len(self._reader)} records and the manifest says "
                f"{self.records}; copy the data set again or prepare it anew"
            )
        item = self.channels * (2 if self.kind == "latents" else 1)  # bytes of one place
        size = sum(s.frames * s.height * s.width * item * len(m)
                   for s, m in zip(self.shapes, self.members))
        size += self.records * max_text_tokens * self.text_width * 4
        self._cache: dict[int, dict] | None = {} if size <= CACHE_BYTES else None
        self._cut_lock, self._cut_told = threading.Lock(), False

    def __len__(self) -> int:
        return self.records

    def record(self, index: int) -> record_files.Record | latent_records.LatentRecord:
        """The stored record, with its caption, source and group."""
        if not 0 <= index < self.records:
            raise IndexError(f"record {index} of {self.records}")
        unpack = latent_records.unpack if self.kind == "latents" else record_files.unpack
        try:
            return unpack(self._reader[int(index)])
        except (ValueError, TypeError, RuntimeError) as error:
            if record_files.disk_error_in(error):
                raise
            raise self._damaged(index, error) from None

    def _damaged(self, index: int, error: Exception) -> UserError:
        words = " ".join(str(error).split())[:200]
        return UserError(f"{self.path}: record {index} is damaged ({words}); copy the data set "
                         "again or prepare it anew")

    def shape(self, index: int) -> Shape:
        """The shape that record `index` has in this run."""
        return self.shapes[self._shape[index]]

    def load(self, index: int) -> dict:
        """{"frames": uint8 [F, H, W, 3] or bfloat16 latents [F, H, W, C], "text": float32 [L, D],
        "text_mask": bool [L], "caption": str} of one record. Small data sets are kept in memory
        once decoded."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        record, shape = self.record(index), self.shape(index)
        try:
            frames = self._latents(record, shape) if self.kind == "latents" else (
                self._pixels(record, shape))
        except (OSError, ValueError) as error:  # the picture is in memory: no disk can fail here
            raise self._damaged(index, error) from None
        self._tell_cut(record)
        text, mask = pad_states(record.text(), self.max_text_tokens)
        sample = {"frames": frames, "text": text, "text_mask": mask, "caption": record.caption}
        if self._cache is not None:
            self._cache[index] = sample
        return sample

    def _pixels(self, record: record_files.Record, shape: Shape) -> np.ndarray:
        frames = record.decode()
        frames = frames[even_frames(len(frames), shape.frames, self._frame_stride(shape))]
        return np.stack([
            fit(Image.fromarray(frame), shape.height, shape.width) for frame in frames
        ])  # [F, H, W, 3]

    def _latents(self, record: latent_records.LatentRecord, shape: Shape) -> np.ndarray:
        if record.values.shape[1:] != (shape.height, shape.width, self.channels) or (
                record.frames < shape.frames):
            raise UserError(
                f"{self.path}: {record.source} has latents {record.values.shape} in a bucket of "
                f"{shape}; prepare the data set anew")
        # The VAE is causal: the first frames of a clip's latents are those of the shorter clip.
        return record.values[: shape.frames]  # [F, H, W, C]

    @functools.cached_property
    def captions(self) -> list[str]:
        """The captions of all records, in record order; reads the whole split once."""
        return [self.record(i).caption for i in range(self.records)]

    def _frame_stride(self, shape: Shape) -> int:
        return 1 if shape.frames == 1 else self._stride

    def _tell_cut(self, record: record_files.Record) -> None:
        if record.tokens > self.max_text_tokens:
            with self._cut_lock:
                told, self._cut_told = self._cut_told, True
            if not told:
                log.warning(
                    "captions longer than data.max_text_tokens = %d tokens are cut, the first "
                    "seen has %d: %.60r",
                    self.max_text_tokens, record.tokens, record.caption,
                )


def open_dataset(
    path: str,
    split: str = "train",
    frames: Sequence[int] = (1,),
    height: int = 0,
    width: int = 0,
    frame_stride: int = 1,
    max_text_tokens: int = 16,
    caption_dropout: float = 0.1,
) -> Dataset:
    """Open a split of a prepared data set ("bundled:emoji" or a folder) for a run.

    frames: clip lengths of the run. 1 takes the stored images; a stored clip, thinned to every
    `frame_stride`-th frame, goes to the largest length that it fills, its frames spread evenly.
    Stored clips that fill none are left out. height, width: 0 keeps the stored sizes (one bucket
    each), otherwise everything is centre-cropped and resized to them with antialias.
    In a data set of latents all of these count latent frames and places, a longer clip gives its
    first frames, and height and width choose among the stored buckets.
    max_text_tokens: token states kept of a caption; more are cut and a warning says so.
    UserError names what does not fit and what the data set has.
    """
    folder = resolve(path)
    manifest = manifests.load(folder)
    if split not in manifest.splits or not manifest.splits[split]:
        have = ", ".join(k for k, n in manifest.splits.items() if n)
        raise UserError(f"data.split {split!r} is not in {path}; it has: {have}")
    if not frames or min(frames) < 1 or frame_stride < 1 or max_text_tokens < 1:
        raise UserError("data.frames, data.frame_stride and data.max_text_tokens start at 1")
    if not 0 <= caption_dropout <= 1:
        raise UserError(f"data.caption_dropout {caption_dropout} is not in [0, 1]")
    if (height == 0) != (width == 0) or min(height, width) < 0:
        raise UserError("data.height and data.width are both 0 (as stored) or both positive")
    sources = []
    stored = [b for b in manifest.buckets if b.split == split]
    if manifest.kind == "latents":
        if frame_stride != 1:
            raise UserError("data.frame_stride must be 1 for a data set of latents; choose the "
                            "frame rate when preparing it")
        stored = _latents_of(path, stored, height, width)
    for bucket in stored:
        count = _frames_of(bucket, frames, frame_stride)
        if count is not None:
            shape = Shape(count, height or bucket.height, width or bucket.width)
            sources.append((bucket, shape))
    missing = set(frames) - {shape.frames for _, shape in sources}
    if missing:
        have = ", ".join(str(n) for n in sorted({b.frames for b in stored}))
        raise UserError(
            f"data.frames {sorted(missing)}: split {split!r} of {path} has nothing for it; stored "
            f"lengths: {have} (frame_stride {frame_stride})"
        )
    return Dataset(folder, manifest, split, sources, frame_stride, max_text_tokens,
                   caption_dropout)


def _latents_of(path, stored, height: int, width: int) -> list[manifests.Bucket]:
    """The buckets of one latent size (0: all of them); latents cannot be resized."""
    chosen = [b for b in stored if height in (0, b.height) and width in (0, b.width)]
    if not chosen:
        have = ", ".join(sorted({f"{b.height} x {b.width}" for b in stored}))
        raise UserError(
            f"data.height x data.width = {height} x {width} is no size of the latents in {path}: "
            f"{have}; set one of these, or 0 for all"
        )
    return chosen


def _frames_of(bucket: manifests.Bucket, frames: Sequence[int], stride: int) -> int | None:
    if bucket.frames == 1:
        return 1 if 1 in frames else None
    usable = -(-bucket.frames // stride)
    return choose_frames(usable, [n for n in frames if n > 1])


class _Steps:
    """grain source: item number `step` is this process's part of that step's batch."""

    def __init__(self, dataset: Dataset, plan: Plan, rows: Callable[[int], np.ndarray] | None,
                 multiple: int = 1):
        self._multiple, self._rows = multiple, rows
        self._dataset, self._plan = dataset, plan
        self._dropped = functools.lru_cache(maxsize=4)(
            lambda epoch: dropped_captions(
                dataset.records, dataset.caption_dropout, plan.seed, epoch
            )
        )

    def __len__(self) -> int:
        return _LAST_STEP

    def __getitem__(self, step: int) -> dict:
        epoch, _ = self._plan.position(step)
        planned = self._plan.batch(step)
        empty = np.full(-len(planned.records) % self._multiple, PADDING, np.int64)
        records = np.concatenate([planned.records, empty])
        part = records if self._rows is None else records[self._rows(len(records))]
        return {**self.assemble(planned.bucket, part, self._dropped(epoch)),
                "size": np.int32(len(records))}

    def assemble(self, bucket: int, numbers: np.ndarray, dropped: np.ndarray) -> dict:
        data, shape = self._dataset, self._dataset.shapes[bucket]
        n = len(numbers)
        frames = np.full(
            (n, shape.frames, shape.height, shape.width, data.channels),
            *((0, np.float32) if data.kind == "latents" else (127, np.uint8)),
        )
        # Padding samples carry the null caption, so that attention always has a token.
        text = np.repeat(data.null_text[None], n, 0)  # [B, L, D]
        mask = np.repeat(data.null_mask[None], n, 0)  # [B, L]
        for i, number in enumerate(numbers):
            if number == PADDING:
                continue
            sample = data.load(int(number))
            frames[i] = sample["frames"]
            if not dropped[number]:
                text[i], mask[i] = sample["text"], sample["text_mask"]
        return {
            "x": frames if data.kind == "latents" else to_unit(frames),
            "text": text,
            "text_mask": mask,
            "loss_mask": (numbers != PADDING).astype(np.float32),
            "index": numbers.astype(np.int32),
        }


def size_field(frames: int, clip_batch_size: int) -> str:
    """The field of config.train that says how many samples of so many frames an update takes."""
    return "clip_batch_size" if clip_batch_size and frames > 1 else "batch_size"


def plan_of(dataset: Dataset, batch_size: int, seed: int, clip_batch_size: int = 0) -> Plan:
    """The plan of a run: its batches_per_epoch is the length of an epoch in steps."""
    sizes = {"batch_size": batch_size, "clip_batch_size": clip_batch_size}
    return Plan.build(dataset.members, [
        sizes[size_field(shape.frames, clip_batch_size)] for shape in dataset.shapes], seed)


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    clip_batch_size: int = 0,
    seed: int,
    start_step: int = 0,
    rows: Callable[[int], np.ndarray] | None = None,
    multiple: int = 1,
    threads: int = 2,
    prefetch: int = 2,
) -> Iterator[dict]:
    """An endless iterator of this process's part of each global batch, from `start_step` on.

    Each item is a dict of numpy arrays: "x" float32 [B, F, H, W, 3] in [-1, 1] (of latents:
    [B, F, H, W, C] as the VAE's encoder normalises them), "text" float32
    [B, L, D], "text_mask" bool [B, L], "loss_mask" float32 [B] (0: padding), "index" int32 [B]
    (-1: padding), and "size" int32 [], how many samples the global batch has. multiple fills every
    batch up with padding to a size that it divides, so that any number of devices can share it. F, H,
    W change from bucket to bucket.
    rows: size of a global batch -> int [B], which of its rows this process reads; None reads all,
    B = size.
    clip_batch_size replaces batch_size for clips (frames > 1) where it is not 0: clips have more
    tokens, and a smaller batch of them keeps the steps alike in cost.
    batch_size, seed and step decide the global batch alone; threads and prefetch only the speed.
    """
    import grain

    plan = plan_of(dataset, batch_size, seed, clip_batch_size)
    source = _Steps(dataset, plan, rows, multiple)
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(prefetch, 1) if threads else 0
    )
    steps = grain.MapDataset.source(source)[start_step:]
    return iter(steps.to_iter_dataset(options))


def load_all(dataset: Dataset) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """The whole split in record order, for evaluation; the run must have one shape.

    Returns frames uint8 [N, F, H, W, 3], captions, text float32 [N, L, D], text_mask bool [N, L].
    """
    if dataset.kind == "latents":
        raise UserError(f"{dataset.path} holds latents, and evaluation compares pixels; name a "
                        "data set of pixels")
    if len(dataset.shapes) != 1:
        raise UserError(
            f"the data set has {len(dataset.shapes)} shapes here; open it with one clip length "
            "and one size to load it whole"
        )
    samples = [dataset.load(i) for i in range(dataset.records)]
    return (
        np.stack([s["frames"] for s in samples]),
        [s["caption"] for s in samples],
        np.stack([s["text"] for s in samples]),
        np.stack([s["text_mask"] for s in samples]),
    )


def to_unit(frames: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]: 0 is -1 and 255 is 1."""
    return frames.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)
