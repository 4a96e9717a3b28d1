"""A folder of captioned media -> a data set of ArrayRecord shards with a manifest.

Every file is probed first, which settles its split and bucket and so the list of shards; then each
shard is written whole. Probes and finished shards are kept in OUT/.work, so that an interrupted
run continues where it was and ends with the very same bytes. With a codec (a VAE) the shards hold
latents, without one WebP pixels.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil

import tqdm

from apt_jax.data import manifest, report, sources
from apt_jax.data.cutting import Plan, plan_latents, plan_pixels, some_train
from apt_jax.data.engines import Engine, open_engine
from apt_jax.data.reasons import Skipped
from apt_jax.data.settings import Settings
from apt_jax.data.work import (
    REPORT,
    SCAN,
    SKIPPED,
    WORK,
    close_work,
    key_of,
    mark_again,
    open_work,
    read_note,
    read_rows,
    write_text,
)
from apt_jax.data.worker import Codec, Encoder, Job
from apt_jax.errors import UserError, disk_error, disk_errors

log = logging.getLogger("apt_jax")

_STRONG = 4  # times that a file grows before it is remarked on: little of what is seen is its own

__all__ = ["REPORT", "SKIPPED", "WORK", "Codec", "Encoder", "Settings", "prepare"]


def prepare(
    source: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings,
    *,
    encoder: Encoder | None = None,
    codec: Codec | None = None,
    threads: int = 2,
    restart: bool = False,
    progress: bool = True,
    engine: str = "local",
    workers: int = 0,
    address: str = "",
) -> manifest.Manifest:
    """Prepare the folder (or archive) `source` into `out`; a rerun continues; returns the manifest.

    A rerun also tries files again that could not be read for a passing reason (`reasons.passes`).

    encoder: the text encoder, MiniLM by default. codec: the VAE; None stores pixels. restart throws
    away what `out` holds. engine: "local", or "ray" with so many `workers` (0: one for each GPU, or
    one a node) on the cluster at `address` ("": start one here). With a codec, OUT/report.json says
    how fast it went and what was left out. UserError when the folder, its table or the settings are
    wrong, when `out` holds another data set, or when nothing usable was found.
    """
    settings.check(latents=codec is not None)
    source, out = pathlib.Path(source), pathlib.Path(out)
    if os.path.realpath(source) == os.path.realpath(out):
        raise UserError(f"{out} is both the source and the output, and shards would lie among the "
                        "media; give the output a folder of its own")
    with disk_errors(source, "read"):
        items, skipped = sources.find_items(source, out)
    if encoder is None:
        from apt_jax.data.captions import TextEncoder

        encoder = TextEncoder()
    made = _made(items, settings, encoder, codec)
    with disk_errors(out):
        work = open_work(out, made, restart, len(items) + len(skipped))
    if work is None:
        return manifest.load(out)

    clock = report.Clock()
    told = _Remarks()
    running = open_engine(engine, source, out, settings, encoder, codec, threads=threads,
                          workers=workers, address=address)
    try:
        plans, unfit = _scan(running, items, settings, codec, work / SCAN, progress, told)
        clock.lap("looking")
        shards, broken, stats = _write_shards(
            running, _jobs(plans, settings.shard_records), out, work, made, progress)
        clock.lap("writing")
        skipped = sorted(skipped + unfit + broken, key=lambda s: s.name)
        if not shards:
            raise UserError(
                f"nothing in {source} could be used; the first of {len(skipped)} reasons: "
                f"{skipped[0].name}: {skipped[0].reason}"
            )
        null, *negative = running.prompts([""] + [settings.negative_prompt]
                                          * (settings.negative_prompt is not None))
        result = manifest.Manifest(
            name=settings.name, encoder=encoder.name, text_width=encoder.width,
            max_tokens=settings.max_tokens, null=null, negative=negative[0] if negative else None,
            splits=_splits(shards), buckets=_buckets(shards, codec), skipped=len(skipped),
            notices=_copy_notices(settings, out), made=made,
            text_dtype="int8" if codec is None else settings.text_dtype,
        )
        lines = (json.dumps(s.to_json(), ensure_ascii=False) + "\n" for s in skipped)
        write_text(out / SKIPPED, "".join(lines))
        if codec is not None:
            write_text(out / REPORT, report.dumps(report.build(
                result, stats, skipped, clock, engine, len(items))))
        again = any(s.passing for s in skipped)
        if again:  # known before the data set looks whole
            mark_again(out)
        write_text(out / manifest.FILE, result.dumps())
        close_work(out, [shard.file for _, shard in shards], again)
    except OSError as error:
        raise UserError(f"{disk_error(error, out)}; what is done is kept, and the "
                        "same command continues") from error
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError("the devices have too little memory for the VAE or the text encoder at "
                        f"these sizes; lower encode_batch = {settings.encode_batch}, the sizes or "
                        "the frames") from None
    finally:
        running.close()
    told.log(len(items))
    return result


class _Remarks:
    """Files that are used though they may not be what was meant; told at the end."""

    def __init__(self):
        self.uncaptioned: list[str] = []
        self.enlarged: list[str] = []

    def look(self, item, row: dict, plan: Plan) -> None:
        """Remember a file that becomes this plan."""
        if not item.caption:
            self.uncaptioned.append(item.name)
        _, _, height, width = plan.bucket
        if max(height / row["height"], width / row["width"]) > _STRONG:
            size = f"{row['width']}x{row['height']} to {width}x{height}"
            self.enlarged.append(f"{item.name}, {size}")

    def log(self, files: int) -> None:
        """A line each; files: of how many."""
        for names, what in ((self.uncaptioned, "an empty caption"),
                            (self.enlarged, f"to be enlarged more than {_STRONG} times")):
            if names:
                log.warning("%d of %d files had %s (the first: %s)", len(names), files, what, names[0])


def _copy_notices(settings: Settings, out: pathlib.Path) -> tuple[str, ...]:
    for notice in map(pathlib.Path, settings.notices):
        if not (out / notice.name).exists() or not notice.samefile(out / notice.name):
            shutil.copyfile(notice, out / notice.name)
    return tuple(pathlib.Path(notice).name for notice in settings.notices)


def _made(items, settings: Settings, encoder: Encoder, codec: Codec | None) -> dict:
    """Everything that decides the output; two runs with the same may continue each other."""
    rows = [(i.name, i.caption, i.group, i.size) for i in items]
    value = settings.made(latents=codec is not None) | {
        "encoder": encoder.name,
        "notices": [pathlib.Path(n).name for n in settings.notices],
        "files_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    if codec is not None:
        value["vae"] = codec.name
    return json.loads(json.dumps(value))  # tuples become lists, as they come back from a file


def _scan(running: Engine, items, settings, codec, progress_file, progress, told: _Remarks):
    """Probe every file; returns (plans, skipped). progress_file keeps the results, a line each."""
    known = read_rows(progress_file)
    fresh = [item for item in items if item.name not in known]
    with open(progress_file, "a", encoding="utf-8") as file, tqdm.tqdm(
        total=len(items), initial=len(items) - len(fresh), desc="looking", unit="file",
        disable=not progress,
    ) as bar:
        file.write("\n")
        for row in running.probe(fresh):
            if not row.get("passing"):
                file.write(json.dumps(row) + "\n")
            known[row["name"]] = row
            bar.update()
    plan_of = plan_pixels if codec is None else plan_latents
    plans, skipped = [], []
    for item in items:
        row = known[item.name]
        if "error" in row:
            skipped.append(Skipped(item.name, row["error"], row.get("passing", False)))
            continue
        found = plan_of(item, row, settings)
        if isinstance(found, str):
            skipped.append(Skipped(item.name, found))
        else:
            plans += found
            told.look(item, row, found[0])
    return some_train(plans), skipped


def _jobs(plans: list[Plan], shard_records: int) -> list[Job]:
    """The shards, in the order of the manifest: buckets sorted, training first."""
    by_bucket = collections.defaultdict(list)
    for plan in plans:
        by_bucket[plan.bucket].append(plan)
    jobs = []
    for bucket in sorted(by_bucket, key=lambda b: (b[0] != "train", *b)):
        split, frames, height, width = bucket
        for number, start in enumerate(range(0, len(by_bucket[bucket]), shard_records)):
            name = f"{split}-{frames:03d}f-{width}x{height}-{number:05d}.arrayrecord"
            jobs.append(Job(name, bucket, tuple(by_bucket[bucket][start : start + shard_records])))
    return jobs


def _write_shards(running: Engine, jobs: list[Job], out, work, made, progress):
    """Write the shards that are not there yet; returns ([(bucket, Shard)], skipped, stats)."""
    keys = {job.name: key_of(made, job) for job in jobs}
    notes = {job.name: read_note(work / f"{job.name}.json", keys[job.name]) for job in jobs}
    left = [job for job in jobs if notes[job.name] is None]
    fresh = {job.name for job in left}
    if fresh:  # where files are tried again the data set was whole before
        (out / manifest.FILE).unlink(missing_ok=True)
    total = sum(len(job.plans) for job in jobs)
    kept = total - sum(len(job.plans) for job in left)  # by an earlier run
    with tqdm.tqdm(total=total, initial=kept, desc="writing", unit="file",
                   disable=not progress) as bar:
        for job, done in running.write(left, bar.update):
            notes[job.name] = done
            write_text(work / f"{job.name}.json", json.dumps(done | {"key": keys[job.name]}))
    shards, skipped, stats = [], [], []
    for job in jobs:
        value = notes[job.name]
        skipped += [Skipped(**s) for s in value["skipped"]]
        stats.append(value["stats"] | {"now": job.name in fresh})
        if value["shard"]["records"]:
            shards.append((job.bucket, manifest.Shard(**value["shard"])))
    return shards, skipped, stats


def _buckets(shards, codec: Codec | None) -> tuple[manifest.Bucket, ...]:
    buckets = []
    for (split, *shape), group in itertools.groupby(shards, lambda s: s[0]):
        files = tuple(shard for _, shard in group)
        stored = shape if codec is None else codec.latent_shape(*shape)
        more = () if codec is None else ("latents", codec.channels, tuple(shape))
        buckets.append(manifest.Bucket(
            split, *stored, sum(s.records for s in files), files, *more))
    return tuple(buckets)


def _splits(shards) -> dict[str, int]:
    splits: dict[str, int] = {}
    for (split, *_), shard in shards:
        splits[split] = splits.get(split, 0) + shard.records
    return splits
