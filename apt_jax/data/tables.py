"""Captioned media in parquet files: a column of bytes and a column of captions (needs pyarrow).

The column of media holds bytes, or a struct with the field `bytes` as the hub's data sets have it.
The format is told from the first bytes.
"""

from __future__ import annotations

import collections
import pathlib
import threading

from apt_jax.data.decode import Blob
from apt_jax.errors import UserError

SUFFIX = ".parquet"
MEDIA_COLUMNS = ("video", "image", "mp4", "webm", "mov", "mkv", "jpg", "jpeg", "png", "webp", "gif",
                 "bytes", "content")
CAPTION_COLUMNS = ("caption", "text", "prompt", "txt")
_KEPT = 2  # row groups in memory


def _parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading parquet needs pyarrow; pip install 'apt_jax[data]'") from None
    return pyarrow.parquet


def list_table(path: pathlib.Path) -> tuple[list[tuple[str, str, str, int, str]], list[tuple]]:
    """([(row name, caption, group, row, media column)], [(row name or '', why it is left out)]).

    UserError where pyarrow is missing; a broken file is listed, not raised.
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


class _RowGroups:
    """The last row groups read, so that the rows of a shard do not read theirs again and again."""

    def __init__(self):
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict = collections.OrderedDict()

    def row(self, path: pathlib.Path, number: int, column: str):
        with self._lock, _parquet().ParquetFile(path) as file:
            group, first = 0, 0
            while number >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            key = (str(path), path.stat().st_mtime_ns, group, column)
            if key not in self._kept:
                self._kept[key] = file.read_row_group(group, columns=[column]).column(0)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key][number - first].as_py()


_row_groups = _RowGroups()


def read_row(path: pathlib.Path, name: str, number: int, column: str) -> Blob:
    """The media of a row that `list_table` found. ValueError if it is empty or of no known kind."""
    value = _row_groups.row(path, number, column)
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
