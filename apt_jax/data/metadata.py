"""metadata.jsonl and metadata.csv: captions and groups of a folder's files, by their names.

Whatever is wrong with a table is one line that names the file and the line in it.
"""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterator

from apt_jax.errors import UserError, disk_errors

TABLES = ("metadata.jsonl", "metadata.csv")


def read_table(table: pathlib.Path) -> dict[str, tuple[str, str]]:
    """file name -> (caption, group). UserError for a table that is broken or cannot be read."""
    rows = _jsonl_rows(table) if table.suffix == ".jsonl" else _csv_rows(table)
    found: dict[str, tuple[str, str]] = {}
    with disk_errors(table, "read"):
        for number, row in rows:
            where = f"{table} line {number}"
            name, text, group = row.get("file_name"), row.get("text"), row.get("group")
            if not isinstance(name, str) or not isinstance(text, str) or not name:
                raise UserError(f"{where}: needs the columns file_name and text")
            pure = pathlib.PurePosixPath(name)
            if (pure.is_absolute() or not pure.parts or ".." in pure.parts
                    or set(name) & set("\\:\0")):
                raise UserError(f"{where}: {name!r} points out of the folder; use names inside it")
            name = pure.as_posix()
            if name in found:
                raise UserError(f"{where}: {name!r} is listed twice; keep one line for each file")
            if group is not None and not isinstance(group, str | int):
                raise UserError(f"{where}: group must be text")
            group = pure.stem if group in (None, "") else str(group)
            if not all(map(is_text, (name, text, group))):
                raise UserError(f"{where}: holds half a character (a \\ud800 without its other "
                                "half); mend the line")
            found[name] = (text, group)
    return found


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: file names and JSON may hold half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(table: pathlib.Path) -> Iterator[str]:
    # What is not UTF-8 comes out as half characters, so that its line can be named.
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(file, 1):
            if not is_text(line):
                raise UserError(f"{table} line {number}: is not UTF-8; save the table as UTF-8")
            if "\0" in line:
                raise UserError(f"{table} line {number}: holds a NUL byte; save the table as UTF-8 "
                                "text")
            yield line


def _jsonl_rows(table: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_lines(table), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{table} line {number}: is not a JSON object; mend the line")
        yield number, row


def _csv_rows(table: pathlib.Path) -> Iterator[tuple[int, dict]]:
    reader, header = csv.reader(_lines(table)), None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{table} line {first}: {error}; mend the line (a quote that is never "
                            "closed takes in the lines after it)") from None
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
        else:
            yield first, dict(zip(header, row))
