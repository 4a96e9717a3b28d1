"""A folder of captioned media -> a data set of ArrayRecord shards with a manifest.

Every file is probed first, which settles its split and bucket and so the list of shards; then each
shard is written whole. Probes and finished shards are kept in OUT/.work, so that an interrupted
run continues where it was and ends with the very same bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import tqdm

from apt_jax.data import decode, manifest, records, sources
from apt_jax.data.buckets import choose_frames, choose_size, choose_split, even_frames
from apt_jax.data.quantise import quantise
from apt_jax.errors import UserError

WORK = ".work"
SKIPPED = "skipped.jsonl"


class Encoder(Protocol):
    """What gives captions their states: see apt_jax.data.captions.TextEncoder."""

    name: str
    width: int

    def encode(self, captions: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """How files become records.

    sizes: (height, width) of the buckets; a file goes to the nearest aspect. frames: clip lengths;
    a file goes to the longest that it fills, 1 is an image. sampling: "even" spreads the frames
    over the whole clip, "consecutive" takes them from the middle at `fps` (0: the file's own rate).
    holdout: part of the groups kept from training. quality: of WebP. background: RGB under
    transparency. max_tokens: of a caption. shard_records: files of one shard.
    """

    name: str = "data"
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    frames: tuple[int, ...] = (1,)
    sampling: str = "consecutive"
    fps: float = 0.0
    holdout: float = 0.05
    quality: int = 90
    background: tuple[int, int, int] = (255, 255, 255)
    max_tokens: int = 64
    shard_records: int = 512
    negative_prompt: str | None = None
    notices: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError for a value that makes no sense."""
        ranges = {
            "sizes": bool(self.sizes) and all(min(s) > 0 for s in self.sizes),
            "frames": bool(self.frames) and min(self.frames) > 0,
            "sampling": self.sampling in ("even", "consecutive"),
            "fps": self.fps >= 0,
            "holdout": 0 <= self.holdout < 1,
            "quality": 1 <= self.quality <= 100,
            "max_tokens": 2 <= self.max_tokens <= 512,
            "shard_records": self.shard_records > 0,
        }
        for key, fine in ranges.items():
            if not fine:
                raise UserError(
                    f"prepare: {key} = {getattr(self, key)!r} is not allowed; see --help"
                )
        for notice in self.notices:
            if not pathlib.Path(notice).is_file():
                raise UserError(f"prepare: no file {notice}; give the path of a licence text")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one file becomes."""

    item: sources.Item
    bucket: tuple[str, int, int, int]  # split, frames, height, width
    wanted: tuple[int, ...]
    fps: float


def prepare(
    source: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings,
    *,
    encoder: Encoder | None = None,
    threads: int = 2,
    restart: bool = False,
    progress: bool = True,
) -> manifest.Manifest:
    """Prepare the folder `source` into `out`; a rerun continues; returns the manifest.

    encoder: the text encoder, MiniLM by default. restart throws away what `out` holds. UserError
    when the folder, its table or the settings are wrong, when `out` holds another data set, or
    when nothing usable was found.
    """
    settings.check()
    source, out = pathlib.Path(source), pathlib.Path(out)
    items, skipped = sources.find_items(source, out)
    if encoder is None:
        from apt_jax.data.captions import TextEncoder

        encoder = TextEncoder()
    made = _made(source, items, settings, encoder)
    work = _open_work(out, made, restart)
    if work is None:
        return manifest.load(out)

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        plans, unfit = _scan(source, items, settings, work / "scan.jsonl", pool, progress)
        shards, broken = _write_shards(source, out, plans, settings, encoder, work, pool, progress)
    skipped = sorted(skipped + unfit + broken, key=lambda s: s.name)
    if not shards:
        raise UserError(
            f"nothing in {source} could be used; the first of {len(skipped)} reasons: "
            f"{skipped[0].name}: {skipped[0].reason}"
        )
    lines = (json.dumps(dataclasses.asdict(s), ensure_ascii=False) + "\n" for s in skipped)
    (out / SKIPPED).write_text("".join(lines), "utf-8")
    notices = []
    for notice in map(pathlib.Path, settings.notices):
        shutil.copyfile(notice, out / notice.name)
        notices.append(notice.name)
    result = _manifest(shards, settings, encoder, len(skipped), tuple(notices), made)
    _write_text(out / manifest.FILE, result.dumps())
    shutil.rmtree(work)
    return result


# -- the folder of unfinished work


def _made(source, items, settings: Settings, encoder: Encoder) -> dict:
    """Everything that decides the output; two runs with the same may continue each other."""
    rows = [(i.name, i.caption, i.group, (source / i.name).stat().st_size) for i in items]
    value = dataclasses.asdict(settings) | {
        "encoder": encoder.name,
        "notices": [pathlib.Path(n).name for n in settings.notices],
        "files_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    return json.loads(json.dumps(value))  # tuples become lists, as they come back from a file


def _open_work(out: pathlib.Path, made: dict, restart: bool) -> pathlib.Path | None:
    """The folder for unfinished work, or None if `out` is already finished with these settings."""
    work = out / WORK
    if restart:
        _clear(out)
    if (out / manifest.FILE).is_file():
        if manifest.load(out).made == made:
            shutil.rmtree(work, ignore_errors=True)
            return None
        raise UserError(f"{out} holds another data set; choose another folder or add --restart")
    work.mkdir(parents=True, exist_ok=True)
    saved = work / "settings.json"
    if saved.is_file() and json.loads(saved.read_text("utf-8")) != made:
        raise UserError(
            f"{out} was begun with other files or settings; repeat those, choose another folder "
            "or add --restart"
        )
    _write_text(saved, json.dumps(made))
    return work


def _clear(out: pathlib.Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in (out / manifest.FILE, out / SKIPPED):
        path.unlink(missing_ok=True)
    for path in out.glob("*.arrayrecord*"):
        path.unlink()


def _write_text(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


# -- first pass: what does each file become?


def _scan(source, items, settings, progress_file, pool, progress):
    """Probe every file; returns (plans, skipped). progress_file keeps the results, a line each."""
    known = {}
    if progress_file.is_file():
        for line in progress_file.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
                known[row["name"]] = row
            except (ValueError, TypeError, KeyError):
                continue  # the line that an interruption cut short

    def probe(item: sources.Item) -> dict:
        if item.name in known:
            return known[item.name]
        try:
            return {"name": item.name} | dataclasses.asdict(decode.probe(source / item.name))
        except Exception as error:  # any decoder, any damage: the file is listed, the run goes on
            return {"name": item.name, "error": _reason(error)}

    plans, skipped = [], []
    with open(progress_file, "a", encoding="utf-8") as file:
        file.write("\n")
        rows = _in_order(pool, probe, items)
        for item, row in zip(items, _bar(rows, len(items), "looking", "file", progress)):
            if item.name not in known:
                file.write(json.dumps(row) + "\n")
            plan = row["error"] if "error" in row else _plan(item, row, settings)
            if isinstance(plan, str):
                skipped.append(sources.Skipped(item.name, plan))
            else:
                plans.append(plan)
    return plans, skipped


def _plan(item: sources.Item, row: dict, settings: Settings) -> _Plan | str:
    """The bucket and the frames of a probed file, or the reason why it fits none."""
    total, rate = row["frames"], row["fps"]
    step = 1.0
    if settings.sampling == "consecutive" and 0 < settings.fps < rate:
        step = rate / settings.fps
    available = max(1, int(total / step))
    count = choose_frames(available, settings.frames)
    if count is None:
        return f"{available} frames are fewer than the shortest clip ({min(settings.frames)})"
    if settings.sampling == "even":
        wanted = even_frames(total, count)
        fps = rate * count / total
    else:
        start = (available - count) // 2
        wanted = [int((start + i) * step) for i in range(count)]
        fps = rate / step
    height, width = choose_size(row["height"], row["width"], settings.sizes)
    split = choose_split(item.group, settings.holdout)
    return _Plan(item, (split, count, height, width), tuple(wanted), fps if count > 1 else 0.0)


# -- second pass: the shards


def _write_shards(source, out, plans, settings, encoder, work, pool, progress):
    """Write the shards that are not there yet; returns ([(bucket, Shard)], skipped)."""
    by_bucket = collections.defaultdict(list)
    for plan in plans:
        by_bucket[plan.bucket].append(plan)
    jobs = []
    for bucket in sorted(by_bucket, key=lambda b: (b[0] != "train", *b)):
        split, frames, height, width = bucket
        for number, start in enumerate(range(0, len(by_bucket[bucket]), settings.shard_records)):
            name = f"{split}-{frames:03d}f-{width}x{height}-{number:05d}.arrayrecord"
            jobs.append((name, bucket, by_bucket[bucket][start : start + settings.shard_records]))

    shards, skipped = [], []
    notes = {name: work / f"{name}.json" for name, _, _ in jobs}
    kept = sum(len(part) for name, _, part in jobs if notes[name].is_file())  # by an earlier run
    with tqdm.tqdm(
        total=len(plans), initial=kept, desc="writing", unit="file", disable=not progress
    ) as bar:
        for name, bucket, part in jobs:
            note = notes[name]
            if not note.is_file():
                done = _write_shard(source, out / name, part, settings, encoder, pool, bar)
                _write_text(note, json.dumps(done))
            value = json.loads(note.read_text("utf-8"))
            skipped += [sources.Skipped(**s) for s in value["skipped"]]
            if value["shard"]["records"]:
                shards.append((bucket, manifest.Shard(**value["shard"])))
    return shards, skipped


def _write_shard(source, path, part, settings, encoder, pool, bar) -> dict:
    """Decode, encode and write one shard; returns its entry and the files that broke."""
    captions = [plan.item.caption for plan in part]
    text, mask = encoder.encode(captions, settings.max_tokens)

    def picture(plan: _Plan) -> bytes | str:
        _, _, height, width = plan.bucket
        try:
            frames = decode.read(
                source / plan.item.name, plan.wanted, height, width, settings.background
            )
        except Exception as error:  # as in _scan
            return _reason(error)
        return records.encode_frames(frames, settings.quality)

    skipped: list[dict] = []

    def packed() -> Iterator[bytes]:
        for index, (plan, made) in enumerate(zip(part, _in_order(pool, picture, part))):
            bar.update()
            if isinstance(made, str):
                skipped.append({"name": plan.item.name, "reason": made})
                continue
            _, frames, height, width = plan.bucket
            values, scales = quantise(text[index, mask[index]])
            yield records.pack(
                records.Record(
                    frames, height, width, round(plan.fps, 6), plan.item.caption, plan.item.name,
                    plan.item.group, values, scales, made,
                )
            )

    count = records.write_shard(path, packed())
    shard = manifest.Shard(path.name, count, path.stat().st_size, manifest.file_hash(path))
    if not count:
        path.unlink()
    return {"shard": dataclasses.asdict(shard), "skipped": skipped}


def _manifest(shards, settings, encoder, skipped, notices, made) -> manifest.Manifest:
    buckets = [
        manifest.Bucket(*key, sum(s.records for _, s in group), tuple(s for _, s in group))
        for key, group in ((k, list(g)) for k, g in itertools.groupby(shards, lambda s: s[0]))
    ]
    splits: dict[str, int] = {}
    for bucket in buckets:
        splits[bucket.split] = splits.get(bucket.split, 0) + bucket.records

    def prompt(caption: str) -> manifest.Prompt:
        text, mask = encoder.encode([caption], settings.max_tokens)
        return manifest.Prompt(caption, *quantise(text[0, mask[0]]))

    negative = settings.negative_prompt
    return manifest.Manifest(
        name=settings.name, encoder=encoder.name, text_width=encoder.width,
        max_tokens=settings.max_tokens, null=prompt(""),
        negative=None if negative is None else prompt(negative),
        splits=splits, buckets=tuple(buckets), skipped=skipped, notices=notices,
        made=made,
    )


# -- small helpers


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _bar(rows: Iterable, total: int, label: str, unit: str, progress: bool):
    return tqdm.tqdm(rows, total=total, desc=label, unit=unit, disable=not progress)


def _in_order(pool: concurrent.futures.Executor, work, items) -> Iterator:
    """pool.map with a window, so that results waiting to be written stay few."""
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 16:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
