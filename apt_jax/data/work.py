"""The folder of unfinished work, OUT/.work: settings, looked-at files, notes of finished shards.

What it holds is enough to go on after an interruption, and it is removed when the data set is
whole; it stays where files could not be read for a passing reason, so that the same command tries
them again. Every file in it is written under another name and renamed. What is damaged all the same
is made again: a note counts only with the shard that it describes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterable

from apt_jax.data import decode, manifest, records
from apt_jax.data.reasons import Skipped
from apt_jax.errors import UserError

log = logging.getLogger("apt_jax")

WORK = ".work"
SKIPPED = "skipped.jsonl"
REPORT = "report.json"
SCAN = "scan.jsonl"
_AGAIN = "again"  # there when the data set is whole but for files that are tried again
_SHARD = r"(train|holdout)-\d{3,}f-\d+x\d+-\d{5,}\.arrayrecord"  # see prepare._jobs
_ABANDONED = 600.0  # seconds after which a partial shard is nobody's
_MEDIA_KEYS = tuple(decode.Media.__dataclass_fields__)


def open_work(out: pathlib.Path, made: dict, restart: bool, files: int = 0) -> pathlib.Path | None:
    """The folder for unfinished work, or None if `out` is already finished with these settings.

    files: how many there are, with those left out. UserError, which says what differs, where `out`
    holds other ones.
    """
    work = out / WORK
    if restart:
        _clear(out)
    if (out / manifest.FILE).is_file():
        try:
            whole = manifest.load(out)
        except UserError as error:
            raise UserError(f"{error}: add --restart") from None
        if whole.made != made:
            # Pixels have a record or an entry for each file.
            then = sum(whole.splits.values()) + whole.skipped if whole.kind == "pixels" else 0
            raise UserError(f"{out} holds another data set ({_differs(whole.made, made, then, files)}"
                            "); choose another folder or add --restart")
        if not (work / _AGAIN).is_file():
            shutil.rmtree(work, ignore_errors=True)
            return None
    work.mkdir(parents=True, exist_ok=True)
    _remove_partial(out, _ABANDONED)
    saved = work / "settings.json"
    begun = _settings(saved)
    if begun is not None and begun != made and any(work.glob("*.arrayrecord.json")):
        raise UserError(
            f"{out} was begun with other files or settings ({_differs(begun, made)}); repeat those, "
            "choose another folder or add --restart"
        )
    if begun is None or begun.get("files_sha256") != made["files_sha256"]:
        (work / SCAN).unlink(missing_ok=True)  # what was seen may be of other files
    write_text(saved, json.dumps(made))
    return work


def _differs(then: dict, now: dict, files_then: int = 0, files_now: int = 0) -> str:
    """What two preparations were asked differently, the files' names first."""
    found = []
    for key in sorted({*then, *now}, key=lambda key: key != "files_sha256"):
        if then.get(key) == now.get(key):
            continue
        if key != "files_sha256":
            old, new = (str(value.get(key))[:60] for value in (then, now))
            found.append(f"{key} {old} there, {new} now")
        elif files_then and files_then != files_now:
            found.append(f"{files_then} files there, {files_now} now")
        else:
            found.append("other files, captions or groups")
    return "; ".join(found)


def _settings(path: pathlib.Path) -> dict | None:
    """What the work was begun with; None where that is not known."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        log.warning("%s is damaged: files are looked at again", path)
        return None
    return value


def close_work(out: pathlib.Path, shards: Iterable[str], again: bool = False) -> None:
    """Remove the folder, and of the shards beside it all but these: partial ones, and ones begun
    with other settings. again keeps what is needed to try some files another time."""
    _remove_partial(out, 0)
    for path in {*_shards(out)} - {out / name for name in shards}:
        path.unlink(missing_ok=True)
    if not again:
        (out / WORK / _AGAIN).unlink(missing_ok=True)  # before what it speaks of
        shutil.rmtree(out / WORK)


def _shards(out: pathlib.Path, partial: bool = False) -> list[pathlib.Path]:
    """What has the name of a shard here, or of a partial one: records of others are left alone."""
    names = re.compile(_SHARD + (r"\.[0-9a-f]+\.tmp" if partial else ""))
    return [path for path in out.glob("*.arrayrecord*") if names.fullmatch(path.name)]


def _remove_partial(out: pathlib.Path, age: float) -> None:
    """Remove the partial shards of killed workers that nobody has written to for `age` seconds."""
    for path in _shards(out, partial=True):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime >= age:
                path.unlink()


def mark_again(out: pathlib.Path) -> None:
    """Say that the data set, which is about to be whole, has files to be tried again."""
    write_text(out / WORK / _AGAIN, "")


def tried_again(out: pathlib.Path) -> int:
    """How many of the files that a finished data set lacks the same command tries again."""
    if not (out / WORK / _AGAIN).is_file():
        return 0
    lines = (out / SKIPPED).read_text("utf-8").split("\n")  # a file's name may hold other ends of lines
    return sum(json.loads(line).get("passing", False) for line in lines if line)


def _clear(out: pathlib.Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in (out / manifest.FILE, out / SKIPPED, out / REPORT):
        path.unlink(missing_ok=True)
    for path in _shards(out):
        path.unlink()
    _remove_partial(out, 0)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(text, "utf-8")
        records.sync(partial)
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # not the partial one
        raise


def read_rows(path: pathlib.Path) -> dict[str, dict]:
    """What was seen of files, by their names; lines that are cut or damaged are passed over."""
    known = {}
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("name"), str) and (
                    isinstance(row.get("error"), str)
                    or all(isinstance(row.get(key), int | float) for key in _MEDIA_KEYS)):
                known[row["name"]] = row
    return known


def key_of(made: dict, job) -> str:
    """Tells shards apart by all that decides their bytes: what was asked for, and their files."""
    plans = [(p.item.name, p.wanted, p.fps, p.start) for p in job.plans]
    return hashlib.sha256(json.dumps([made, job.bucket, plans]).encode()).hexdigest()


def read_note(path: pathlib.Path, key: str) -> dict | None:
    """The note of a finished shard: {"shard": .., "skipped": .., "stats": ..}.

    None where there is none, or it is of another shard or damaged, or the shard itself is, or where
    one of its files is to be tried again.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
        shard = manifest.Shard(**value["shard"])
        skipped = [Skipped(**entry) for entry in value["skipped"]]
        if value["key"] != key or any(entry.passing for entry in skipped):
            return None
        dict(value["stats"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = not shard.records or records.is_whole(
        path.parent.parent / shard.file, shard.bytes, shard.records)
    return value if whole else None
