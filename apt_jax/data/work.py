"""The folder of unfinished work, OUT/.work: settings, looked-at files, notes of finished shards.

What it holds is enough to go on after an interruption, and it is removed when the data set is
whole. Every file in it is written under another name and renamed.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from apt_jax.data import manifest
from apt_jax.errors import UserError

WORK = ".work"
SKIPPED = "skipped.jsonl"
REPORT = "report.json"


def open_work(out: pathlib.Path, made: dict, restart: bool) -> pathlib.Path | None:
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
    write_text(saved, json.dumps(made))
    return work


def close_work(out: pathlib.Path) -> None:
    """Remove the folder, and the partial shards of workers that were killed."""
    for path in out.glob("*.arrayrecord.*.tmp"):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / WORK)


def _clear(out: pathlib.Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in (out / manifest.FILE, out / SKIPPED, out / REPORT):
        path.unlink(missing_ok=True)
    for path in out.glob("*.arrayrecord*"):
        path.unlink()


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def read_rows(path: pathlib.Path) -> dict[str, dict]:
    """Lines of JSON by their "name"; a line that an interruption cut short is passed over."""
    known = {}
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
                known[row["name"]] = row
            except (ValueError, TypeError, KeyError):
                continue
    return known
