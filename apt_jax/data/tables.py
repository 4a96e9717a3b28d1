"""Captioned media in parquet files: a column of bytes and a column of captions (needs pyarrow).

The column of media holds bytes, or a struct with the field `bytes` as the hub's data sets have it.
The format is told from the first bytes.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import pathlib
import threading

from apt_jax.data.decode import Blob
from apt_jax.errors import UserError, passes

SUFFIX = ".parquet"
MEDIA_COLUMNS = ("video", "image", "mp4", "webm", "mov", "mkv", "jpg", "jpeg", "png", "webp", "gif",
                 "bytes", "content")
CAPTION_COLUMNS = ("caption", "text", "prompt", "txt")
_KEPT = 2  # row groups in memory
_OPEN = 4  # files held open, with their footers


def _parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading parquet needs pyarrow; pip install 'apt_jax[data]'") from None
    return pyarrow.parquet


def list_table(path: pathlib.Path) -> tuple[list[tuple[str, str, str, int, str]], list[tuple]]:
    """([(row name, caption, group, row, media column)], [(row name or '', why it is left out)]).

    UserError where pyarrow is missing, OSError where the disk fails; a broken file is listed.
    """
    parquet = _parquet()
    try:
        with parquet.ParquetFile(path) as file:
            media, caption = _columns(file.schema_arrow)
            wanted = [caption] + ["group"] * ("group" in file.schema_arrow.names)
            rows = file.read(columns=wanted).to_pydict()
    except UserError:
        raise
    except Exception as error:  # pyarrow's own kinds of damage, and missing columns
        if passes(error):
            raise
        return [], [("", " ".join(f"{type(error).__name__}: {error}".split())[:200])]
    found, skipped = [], []
    groups = rows.get("group") or [None] * len(rows[caption])
    for number, (text, group) in enumerate(zip(rows[caption], groups)):
        name = f"{number:06d}"
        if text is None:
            skipped.append((name, f"no caption in column {caption!r}"))
        else:
            group = f"{path.stem}/{name}" if group in (None, "") else str(group)
            found.append((name, text, group, number, media))
    return found, skipped


def _columns(schema) -> tuple[str, str]:
    """Names of the columns of media and captions; ValueError that lists what there is."""
    import pyarrow as pa

    def holds_bytes(kind) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    media = [f.name for f in schema if holds_bytes(f.type)]
    texts = [f.name for f in schema if pa.types.is_string(f.type) or
             pa.types.is_large_string(f.type)]
    found = []
    for what, have, names in (("media (bytes)", media, MEDIA_COLUMNS),
                              ("captions (text)", texts, CAPTION_COLUMNS)):
        known = [name for name in names if name in have]
        if not known and len(have) != 1:
            raise ValueError(f"no column of {what}: name one of them {names[0]!r}; there are "
                             f"{', '.join(schema.names)}")
        found.append((known or have)[0])
    return found[0], found[1]


class _Reader:
    """Files held open and the last row groups read, so that rows in order read nothing twice."""

    def __init__(self):
        self._lock = threading.Lock()
        self._files: collections.OrderedDict = collections.OrderedDict()
        self._groups: collections.OrderedDict = collections.OrderedDict()

    def row(self, path: pathlib.Path, number: int, column: str):
        """The value of one cell."""
        with self._lock:
            now = path.stat()
            key = (str(path), now.st_mtime_ns, now.st_size)
            try:
                file, ends = self._file(path, key)
                group = bisect.bisect_right(ends, number)
                values = self._group(file, (*key, group, column))
                return values[number - (ends[group - 1] if group else 0)].as_py()
            except BaseException:  # an open file whose disk failed is not to be trusted
                if key in self._files:
                    self._files.pop(key)[0].close()
                raise

    def _file(self, path: pathlib.Path, key: tuple):
        """(the open file, the row after the last of each row group)."""
        if key not in self._files:
            file = _parquet().ParquetFile(path)
            rows = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
            self._files[key] = file, list(itertools.accumulate(rows))
            while len(self._files) > _OPEN:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(key)
        return self._files[key]

    def _group(self, file, key: tuple):
        if key not in self._groups:
            *_, group, column = key
            self._groups[key] = file.read_row_group(group, columns=[column]).column(0)
            while len(self._groups) > _KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


_reader = _Reader()


def read_row(path: pathlib.Path, name: str, number: int, column: str) -> Blob:
    """The media of a row that `list_table` found. ValueError if it is empty or of no known kind."""
    value = _reader.row(path, number, column)
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise ValueError(f"no bytes in column {column!r}")
    return Blob(name + suffix_of(data), data)


def suffix_of(data: bytes) -> str:
    """The file suffix that the first bytes tell. ValueError for an unknown kind."""
    head = data[:16]
    if head[4:8] == b"ftyp":
        return ".mov" if head[8:10] == b"qt" else ".mp4"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    for start, suffix in ((b"\x1aE\xdf\xa3", ".mkv"), (b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"),
                          (b"GIF8", ".gif")):
        if head.startswith(start):
            return suffix
    raise ValueError("bytes of no known image or video format")
