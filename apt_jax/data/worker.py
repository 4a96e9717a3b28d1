"""What one worker of a preparation does: look at files, and write one shard whole.

An engine (`engines`, `ray_engine`) decides where workers run; here is what they do, for pixels and
for latents. A shard is written under a name of its own and renamed when it is whole, so it does not
matter how often it was begun, nor where.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from apt_jax.data import decode, latent_records, manifest, records, resample, sources
from apt_jax.data.cutting import Plan
from apt_jax.data.quantise import quantise, store
from apt_jax.data.reasons import Skipped, skipped
from apt_jax.data.settings import Settings
from apt_jax.errors import UserError, passes

_CAPTIONS = 32  # captions of one call of the text encoder


class Encoder(Protocol):
    """What gives captions their states: see apt_jax.data.captions.TextEncoder."""

    name: str
    width: int

    def encode(self, captions: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]: ...


class Codec(Protocol):
    """What gives frames their latents: see apt_jax.data.vae_codec.VaeCodec.

    name: says which weights. channels: of the latents. batch: samples of one call.
    """

    name: str
    channels: int
    batch: int

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]: ...

    def encode(self, frames: np.ndarray) -> Any:
        """uint8 [B, F, H, W, 3], B <= batch -> [B, F', H', W', C], maybe still being computed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard: its file name, its bucket in pixels, and what goes into it, in order."""

    name: str
    bucket: tuple[str, int, int, int]
    plans: tuple[Plan, ...]


class Worker:
    """Looks at files of `source` and writes shards into `out`. codec None: pixels."""

    def __init__(self, source: pathlib.Path, out: pathlib.Path, settings: Settings,
                 encoder: Encoder, codec: Codec | None = None, threads: int = 2):
        self.source, self.out, self.settings = source, out, settings
        self.encoder, self.codec = encoder, codec
        self._window = max(16, 2 * threads) if codec is None else threads + 2 * codec.batch
        self._pool = concurrent.futures.ThreadPoolExecutor(max(1, threads))

    def close(self) -> None:
        """Ends the decoding threads."""
        self._pool.shutdown(cancel_futures=True)

    def probe(self, items: Sequence[sources.Item]) -> Iterator[dict]:
        """A row for each file: its name and what `decode.probe` saw, or "error" and "passing"."""
        def look(item: sources.Item) -> dict:
            try:
                media = decode.probe(sources.fetch(self.source, item))
                return {"name": item.name} | dataclasses.asdict(media)
            except Exception as error:  # any decoder, any damage: it is listed, the run goes on
                left = self._left_out(item, error)
                return {"name": item.name, "error": left.reason, "passing": left.passing}

        yield from self._in_order(look, items)

    def prompts(self, captions: Sequence[str]) -> list[manifest.Prompt]:
        """The states of fixed captions, as the manifest keeps them."""
        kind = "int8" if self.codec is None else self.settings.text_dtype
        found = []
        for caption in captions:
            text, mask = self.encoder.encode([caption], self.settings.max_tokens)
            found.append(manifest.Prompt(caption, *store(text[0, mask[0]], kind)))
        return found

    def write(self, job: Job, tick: Callable[[], Any] = lambda: None) -> dict:
        """Decode, encode and write one shard; returns {"shard", "skipped", "stats"} for JSON.

        tick is called after every file. An OSError of the output (a full disk) goes through.
        """
        left_out: list[Skipped] = []
        sizes: dict[str, int] = {}  # of the files that are read, by name
        stats = {"files": len({p.item.name for p in job.plans}), "frames": 0, "bytes_in": 0,
                 "waiting": 0.0, "encoding": 0.0, "text": 0.0}
        begun = time.perf_counter()
        make = self._pixels if self.codec is None else self._latents
        path = self.out / job.name
        count = records.write_shard(path, make(job, left_out, sizes, stats, tick))
        shard = manifest.Shard(path.name, count, path.stat().st_size, manifest.file_hash(path))
        if not count:
            path.unlink()
        stats |= {"records": count, "seconds": time.perf_counter() - begun,
                  "bytes_in": sum(sizes.values())}
        return {"shard": dataclasses.asdict(shard),
                "skipped": [entry.to_json() for entry in left_out], "stats": stats}

    # -- records of a shard, one generator for each kind

    def _pixels(self, job, left_out, sizes, stats, tick) -> Iterator[bytes]:
        text, mask = self.encoder.encode(
            [plan.item.caption for plan in job.plans], self.settings.max_tokens)
        _, frames, height, width = job.bucket

        def picture(plan: Plan) -> bytes | Skipped:
            try:
                pixels = decode.read(self._fetch(plan, sizes), plan.wanted, height, width,
                                     self.settings.background)
            except Exception as error:  # as in probe
                return self._left_out(plan.item, error)
            return records.encode_frames(pixels, self.settings.quality)

        for index, (plan, made) in enumerate(zip(job.plans, self._in_order(picture, job.plans))):
            tick()
            if isinstance(made, Skipped):
                left_out.append(made)
                continue
            stats["frames"] += frames
            values, scales = quantise(text[index, mask[index]])
            yield records.pack(records.Record(
                frames, height, width, round(plan.fps, 6), plan.item.caption, plan.item.name,
                plan.item.group, values, scales, made,
            ))

    def _latents(self, job, left_out, sizes, stats, tick) -> Iterator[bytes]:
        began = time.perf_counter()
        states = self._states([plan.item.caption for plan in job.plans])
        stats["text"] += time.perf_counter() - began
        waiting: collections.deque = collections.deque()
        for part in self._decoded(job, left_out, sizes, stats, tick):
            began = time.perf_counter()
            waiting.append(([plan for plan, _ in part],
                            self.codec.encode(np.stack([frames for _, frames in part]))))
            stats["encoding"] += time.perf_counter() - began
            if len(waiting) > 1:  # one batch is computed while the one before it is written
                yield from self._packed(*waiting.popleft(), states, left_out, stats)
        while waiting:
            yield from self._packed(*waiting.popleft(), states, left_out, stats)

    def _states(self, captions: Sequence[str]) -> dict[str, tuple]:
        """caption -> its trimmed states as they are stored; each caption is encoded once."""
        distinct = list(dict.fromkeys(captions))
        found = {}
        for start in range(0, len(distinct), _CAPTIONS):
            part = distinct[start : start + _CAPTIONS]
            text, mask = self.encoder.encode(part, self.settings.max_tokens)
            for caption, states, valid in zip(part, text, mask):
                found[caption] = store(states[valid], self.settings.text_dtype)
        return found

    def _decoded(self, job, left_out, sizes, stats, tick
                 ) -> Iterator[list[tuple[Plan, np.ndarray]]]:
        """Full batches of decoded plans, then the rest."""
        _, count, height, width = job.bucket

        def clip(plan: Plan) -> np.ndarray | Skipped:
            try:
                return resample.read_clip(self._fetch(plan, sizes), plan.start, plan.fps, count,
                                          height, width, self.settings.background)
            except Exception as error:  # as in probe
                return self._left_out(plan.item, error)

        part, rows = [], self._in_order(clip, job.plans)
        for plan in job.plans:
            began = time.perf_counter()
            made = next(rows)
            stats["waiting"] += time.perf_counter() - began
            tick()
            if isinstance(made, Skipped):
                left_out.append(made)
                continue
            stats["frames"] += count
            part.append((plan, made))
            if len(part) == self.codec.batch:
                yield part
                part = []
        if part:
            yield part

    def _packed(self, plans, encoded, states, left_out, stats) -> Iterator[bytes]:
        began = time.perf_counter()
        latents = np.asarray(encoded, latent_records.BFLOAT16)  # [B, F', H', W', C]
        stats["encoding"] += time.perf_counter() - began
        for plan, values in zip(plans, latents):
            if not np.isfinite(values.astype(np.float32)).all():
                reason = f"the VAE's latents at {plan.start:.2f} s are not finite"
                left_out.append(Skipped(plan.item.name, reason))
                continue
            yield latent_records.pack(latent_records.LatentRecord(
                round(plan.fps, 6), round(plan.start, 6), plan.item.caption, plan.item.name,
                plan.item.group, *states[plan.item.caption], values))

    def _in_order(self, work: Callable, items: Iterable) -> Iterator:
        """pool.map with a window, so that results waiting to be written stay few."""
        waiting: collections.deque = collections.deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(work, item))
                if len(waiting) >= self._window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _left_out(self, item: sources.Item, error: Exception) -> Skipped:
        """The entry of a file that could not be used: damaged, or on a disk that fails.

        UserError for what is wrong here and not with the file, such as a package that is missing.
        """
        if isinstance(error, UserError):
            raise error
        if isinstance(error, ImportError):
            raise UserError(f"{error}; install the package on this machine") from error
        if not passes(error):
            try:
                decode.read_through(sources.fetch(self.source, item))
            except Exception as other:
                error = other if passes(other) else error
        return skipped(item.name, error)

    def _fetch(self, plan: Plan, sizes: dict[str, int]) -> decode.File:
        file = sources.fetch(self.source, plan.item)
        sizes[plan.item.name] = decode.bytes_of(file)
        return file
