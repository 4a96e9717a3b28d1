"""Captioned media in WebDataset tars: members of one key, `key.mp4` and `key.txt` or `key.json`.

The key of a member is its path up to the first dot of the file name, as WebDataset has it. A tar is
read where it lies: members are found by their headers and fetched by offset. Where a header is
damaged the search goes on block by block to the next good one, and the gap is listed.
"""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Iterator

from apt_jax.data.decode import MEDIA
from apt_jax.errors import passes

SUFFIX = ".tar"
CAPTION_KEYS = ("caption", "text", "prompt")
_BLOCK = 512
_TEXTS = (".txt", ".json")
_TEXT_LIMIT = 2**20


def list_tar(path: pathlib.Path) -> tuple[list[tuple], list[tuple[str, str]]]:
    """([(member, caption, group, offset, size)], [(member or place, why it is left out)]).

    OSError where the disk fails; damage is listed.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    skipped = []
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        for found in _members(file, end):
            if isinstance(found, str):
                skipped.append((f"@{found}", "is no tar member: damaged"))
            elif found.isreg():
                name = pathlib.PurePosixPath(found.name)
                key = str(name.parent / name.name.split(".")[0])
                suffix = name.suffix.lower()
                if found.offset_data + found.size > end:
                    skipped.append((found.name, "cut short: the archive ends before it"))
                elif suffix in MEDIA or suffix in _TEXTS:
                    sample = samples.setdefault(key, {})
                    if found.name in sample:
                        skipped.append((found.name, "is there twice: the first one is taken"))
                    else:
                        sample[found.name] = found.offset_data, found.size
        rows = []
        for members in samples.values():
            rows_of, left_out = _sample(file, members)
            rows += rows_of
            skipped += left_out
    return rows, skipped


def _sample(file, members: dict[str, tuple[int, int]]) -> tuple[list[tuple], list[tuple]]:
    """The media of one key with their caption."""
    media = [n for n in members if pathlib.PurePosixPath(n).suffix.lower() in MEDIA]
    texts = [n for n in members if n not in media]
    if not media:
        return [], [(texts[0], "no media of this key in the archive")]
    caption = group = None
    for name in sorted(texts, reverse=True):  # .txt before .json
        offset, size = members[name]
        file.seek(offset)
        said, group_said = _caption(name, file.read(min(size, _TEXT_LIMIT)))
        caption = said if caption is None else caption
        group = group_said if group is None else group
    if caption is None:
        return [], [(name, "no caption: no .txt or .json of its key that has one")
                    for name in media]
    stem = pathlib.PurePosixPath(media[0]).name.split(".")[0]
    return [(name, caption, group or stem, *members[name]) for name in media], []


def _caption(name: str, data: bytes) -> tuple[str | None, str | None]:
    try:
        text = data.decode("utf-8-sig")
        if name.lower().endswith(".txt"):
            return text, None
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(value, dict):
        return None, None
    caption = next((value[k] for k in CAPTION_KEYS if isinstance(value.get(k), str)), None)
    group = value.get("group")
    return caption, str(group) if isinstance(group, str | int) else None


def _members(file, end: int) -> Iterator[tarfile.TarInfo | str]:
    """The members of a tar, and 'FIRST-LAST' (bytes) of what is damaged between them."""
    start = 0  # where the next header should be
    while start < end:
        file.seek(start)
        try:
            # ignore_zeros also goes past invalid headers, block by block.
            with tarfile.TarFile(fileobj=file, ignore_zeros=True, errors="replace") as archive:
                for member in archive:
                    if gap := _damage(file, start, member.offset):
                        yield gap
                    start = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    yield member
                    file.seek(min(start, end))
            break
        except (tarfile.TarError, ValueError, OSError) as error:
            if passes(error):
                raise
            start += _BLOCK  # a damaged extended header: try again behind it
    if gap := _damage(file, start, end):
        yield gap


def _damage(file, first: int, last: int) -> str:
    """'FIRST-LAST' if these bytes hold anything but zeros (padding), else ''."""
    file.seek(first)
    for place in range(first, last, 2**20):
        if file.read(min(2**20, last - place)).strip(b"\0"):
            return f"{first}-{last}"
    return ""
