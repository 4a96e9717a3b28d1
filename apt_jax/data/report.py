"""How a preparation went: counts, throughput and every file that was left out, JSON and a table."""

from __future__ import annotations

import collections
import json
import pathlib
import time

from apt_jax.data.manifest import Manifest
from apt_jax.errors import UserError


class Clock:
    """Wall seconds of the parts of a run."""

    def __init__(self):
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def build(made: Manifest, stats: list[dict], skipped, clock: Clock, engine: str,
          files: int) -> dict:
    """The report of a finished data set.

    stats: one of each shard, with "now" where this run wrote it: rates are those of this run, all
    else counts the whole data set. Bytes read are those of the media themselves, each once for
    every shard that it is in; bytes written are those of the shards.
    """
    now = [s for s in stats if s["now"]]
    wall = clock.seconds["writing"]

    def total(key: str, rows=stats) -> float:
        return sum(row[key] for row in rows)

    def rate(key: str) -> float:
        return round(total(key, now) / wall, 4) if now and wall else 0.0

    written = sum(shard.bytes for bucket in made.buckets for shard in bucket.shards)
    return {
        "name": made.name,
        "engine": engine,
        "files": files,
        "records": sum(made.splits.values()),
        "frames": int(total("frames")),
        "gigabytes": {"read": round(total("bytes_in") / 1e9, 6),
                      "written": round(written / 1e9, 6)},
        "this_run": {
            "seconds": {k: round(v, 3) for k, v in clock.seconds.items()},
            "shards": len(now),
            "files_per_second": rate("files"),
            "records_per_second": rate("records"),
            "frames_per_second": rate("frames"),
            "megabytes_read_per_second": round(rate("bytes_in") / 1e6, 4),
        },
        "worker_seconds": {k: round(total(k), 3) for k in ("waiting", "encoding", "text",
                                                           "seconds")},
        "skipped": [s.to_json() for s in skipped],
    }


def dumps(value: dict) -> str:
    """JSON text with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def load(path: pathlib.Path) -> dict:
    """The inverse of `dumps` on a file. UserError where that is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged, the data set beside it is whole; remove {path.name}"
                        ) from None


def table(value: dict, shown: int = 10) -> str:
    """The report as text: a line a figure, then what was left out, grouped by reason."""
    run, size = value["this_run"], value["gigabytes"]
    seconds = run["seconds"]
    lines = [
        ("files", f"{value['files']}, {len(value['skipped'])} entries left out"),
        ("records", f"{value['records']} with {value['frames']} frames"),
        ("read, written", f"{size['read']:.3f} GB, {size['written']:.3f} GB"),
        ("looking, writing", f"{seconds['looking']:.1f} s, {seconds['writing']:.1f} s"),
        ("this run", f"{run['shards']} shards: {run['files_per_second']:.2f} files/s, "
                     f"{run['frames_per_second']:.1f} frames/s, "
                     f"{run['megabytes_read_per_second']:.2f} MB/s"),
        ("workers", ", ".join(f"{k} {v:.1f} s" for k, v in value["worker_seconds"].items()
                              if k != "seconds")),
    ]
    text = [f"{name:<18}{what}" for name, what in lines]
    reasons = collections.Counter(s["reason"] for s in value["skipped"])
    first = {}
    for entry in value["skipped"]:
        first.setdefault(entry["reason"], entry["name"])
    for reason, count in reasons.most_common(shown):
        text.append(f"{'left out':<18}{count} x {reason[:80]} (the first: {first[reason]})")
    if len(reasons) > shown:
        text.append(f"{'left out':<18}and for {len(reasons) - shown} other reasons")
    return "\n".join(text)
