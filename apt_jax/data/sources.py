"""Find the captioned files of a folder, also those in its WebDataset tars and parquet files.

Captions come from metadata.jsonl or metadata.csv in the folder (columns file_name, text and, if
wanted, group), else from a .txt beside the file; those of an archive from the archive. Files of one
group stay in one split; without a group the file's stem is the group.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib

from apt_jax.data import archives, tables
from apt_jax.data.decode import MEDIA, File, Member
from apt_jax.errors import UserError

TABLES = ("metadata.jsonl", "metadata.csv")
ARCHIVES = (archives.SUFFIX, tables.SUFFIX)
_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclasses.dataclass(frozen=True)
class Item:
    """One file to prepare: its name relative to the folder (with '/'), caption and group.

    In an archive the name goes on after the archive's own; `place` is the offset of a tar member or
    the number of a parquet row, `size` the member's bytes, `column` the parquet column of media.
    """

    name: str
    caption: str
    group: str
    archive: str = ""
    place: int = 0
    size: int = 0
    column: str = ""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file that is left out, and why."""

    name: str
    reason: str


def find_items(root: pathlib.Path, ignore: pathlib.Path) -> tuple[list[Item], list[Skipped]]:
    """All captioned media files under root, sorted by name, and those that cannot be used.

    root may be one archive, too. The folder `ignore` (the output) is passed over. UserError for a
    folder that is missing or without media, and for a table that is broken or points out of the
    folder.
    """
    if root.is_file() and root.suffix.lower() in ARCHIVES:
        items, skipped = _find_in_archives(root.parent, [root.name])
        return _some(root, items, skipped)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give the folder with the images and videos")
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{root} has both {' and '.join(TABLES)}; keep one of them")
    listed = _read_table(tables[0]) if tables else {}
    items, skipped = [], []
    for name in sorted(set(listed) | set(_walk(root, ignore, MEDIA))):
        path = root / name
        caption, group = listed.get(name) or (_read_text(path), path.stem)
        if not path.is_file():
            skipped.append(Skipped(name, "no such file"))
        elif not path.resolve().is_relative_to(root.resolve()):
            skipped.append(Skipped(name, "a link out of the folder"))
        elif path.suffix.lower() not in MEDIA:
            skipped.append(Skipped(name, f"not one of {' '.join(MEDIA)}"))
        elif caption is None:
            skipped.append(Skipped(name, "no caption: not in the table and no .txt beside it"))
        else:
            items.append(Item(name, " ".join(caption.split()), group))
    skipped += [Skipped(name, "a compressed tar; decompress it")
                for name in _walk(root, ignore, _COMPRESSED)]
    inside, left_out = _find_in_archives(root, sorted(_walk(root, ignore, ARCHIVES)))
    return _some(root, items + inside, skipped + left_out)


def fetch(source: pathlib.Path, item: Item) -> File:
    """Where the decoder finds an item of `source`: a path, or a place or bytes in an archive."""
    if not item.archive:
        return source / item.name
    path = base(source) / item.archive
    member = item.name[len(item.archive) + 1 :]
    if item.column:
        return tables.read_row(path, member, item.place, item.column)
    return Member(member, path, item.place, item.size)


def size_of(source: pathlib.Path, item: Item) -> int:
    """Bytes of an item's file (of the whole parquet file for a row of it)."""
    if item.size:
        return item.size
    return (base(source) / (item.archive or item.name)).stat().st_size


def base(source: pathlib.Path) -> pathlib.Path:
    """The folder that names are relative to: the source, or that of the one archive."""
    return source.parent if source.is_file() else source


def _find_in_archives(root: pathlib.Path, names) -> tuple[list[Item], list[Skipped]]:
    items, skipped = [], []
    for name in names:
        if (root / name).suffix.lower() == tables.SUFFIX:
            rows, left_out = tables.list_table(root / name)
            rows = [(*row[:4], 0, row[4]) for row in rows]  # members have sizes, rows columns
        else:
            rows, left_out = archives.list_tar(root / name)
            rows = [(*row, "") for row in rows]
        items += [Item(f"{name}/{member}", " ".join(caption.split()), group, name, *rest)
                  for member, caption, group, *rest in rows]
        skipped += [Skipped(f"{name}/{place}".rstrip("/"), reason) for place, reason in left_out]
    return items, skipped


def _some(root, items, skipped):
    if not items:
        reason = f"; the first of {len(skipped)} left out: {skipped[0]}" if skipped else ""
        raise UserError(f"{root} holds no captioned image or video{reason}; add metadata.jsonl")
    return items, skipped


def _walk(root: pathlib.Path, ignore: pathlib.Path, suffixes: tuple[str, ...]):
    for folder, folders, files in os.walk(root):
        here = pathlib.Path(folder)
        folders[:] = sorted(
            f for f in folders
            if not f.startswith(".") and (here / f).resolve() != ignore.resolve()
        )
        for file in files:
            if file.lower().endswith(suffixes) and not file.startswith("."):
                yield (here / file).relative_to(root).as_posix()


def _read_text(path: pathlib.Path) -> str | None:
    beside = path.with_suffix(".txt")
    try:
        return beside.read_text("utf-8") if beside.is_file() else None
    except UnicodeDecodeError:
        return None


def _read_table(table: pathlib.Path) -> dict[str, tuple[str, str]]:
    """file name -> (caption, group)."""
    rows = _jsonl_rows(table) if table.suffix == ".jsonl" else _csv_rows(table)
    found: dict[str, tuple[str, str]] = {}
    for number, row in rows:
        where = f"{table} line {number}"
        name, text, group = row.get("file_name"), row.get("text"), row.get("group")
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise UserError(f"{where}: needs the columns file_name and text")
        pure = pathlib.PurePosixPath(name)
        if pure.is_absolute() or not pure.parts or ".." in pure.parts or set(name) & set("\\:\0"):
            raise UserError(f"{where}: {name!r} points out of the folder; use names inside it")
        name = pure.as_posix()
        if name in found:
            raise UserError(f"{where}: {name!r} is listed twice; keep one line for each file")
        if group is not None and not isinstance(group, str | int):
            raise UserError(f"{where}: group must be text")
        found[name] = (text, pure.stem if group in (None, "") else str(group))
    return found


def _jsonl_rows(table: pathlib.Path):
    with open(table, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{table} line {number}: is not a JSON object; mend the line")
            yield number, row


def _csv_rows(table: pathlib.Path):
    with open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, row
