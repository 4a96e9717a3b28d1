"""Find the captioned files of a folder, also those in its WebDataset tars and parquet files.

Captions come from metadata.jsonl or metadata.csv in the folder (columns file_name, text and, if
wanted, group), else from a .txt beside the file; those of an archive from the archive. Files of one
group stay in one split; without a group the file's stem is the group.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat

from apt_jax.data import archives, tables
from apt_jax.data.decode import MEDIA, UNREAD, File, Member
from apt_jax.data.metadata import TABLES, is_text, read_table
from apt_jax.data.reasons import Skipped
from apt_jax.errors import UserError, disk_error, disk_errors, passes

ARCHIVES = (archives.SUFFIX, tables.SUFFIX)
_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TEXT_LIMIT = 2**20  # characters of a caption


@dataclasses.dataclass(frozen=True)
class Item:
    """One file to prepare: its name relative to the folder (with '/'), caption and group.

    In an archive the name goes on after the archive's own; `place` is the offset of a tar member or
    the number of a parquet row, `column` the parquet column of media. `size` is the bytes of the
    file or tar member, for a parquet row those of the whole parquet file.
    """

    name: str
    caption: str
    group: str
    archive: str = ""
    place: int = 0
    size: int = 0
    column: str = ""


def find_items(root: pathlib.Path, ignore: pathlib.Path) -> tuple[list[Item], list[Skipped]]:
    """All captioned media files under root, sorted by name, and those that cannot be used.

    root may be one archive, too. The folder `ignore` (the output) is passed over. UserError for a
    folder that is missing or without media, and for a table that is broken or points out of the
    folder.
    """
    if root.is_file() and root.suffix.lower() in ARCHIVES:
        if not is_text(root.name):
            raise UserError(f"{ascii(root.name)} is no UTF-8 name; rename the archive")
        items, skipped = _find_in_archives(root.parent, [root.name])
        return _some(root, items, skipped)
    if root.name.lower().endswith(_COMPRESSED) and root.is_file():
        raise UserError(f"{root} is a compressed tar; decompress it, its members are read in place")
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give the folder with the images and videos")
    tables_here = [root / name for name in TABLES if (root / name).is_file()]
    if len(tables_here) > 1:
        raise UserError(f"{root} has both {' and '.join(TABLES)}; keep one of them")
    listed = read_table(tables_here[0]) if tables_here else {}
    names, skipped = _walk(root, ignore)
    real_root = os.path.realpath(root)
    items, containers = [], []
    for name in sorted({*listed, *(n for n in names if n.lower().endswith(MEDIA + UNREAD))}):
        found = _item(root, name, listed.get(name), real_root)
        items.append(found) if isinstance(found, Item) else skipped.append(Skipped(name, found))
    for name in sorted(n for n in names if n.lower().endswith(ARCHIVES)):
        fault, _ = _state(root / name, name, "/")  # may be a link: tars lie on disks of their own
        skipped.append(Skipped(name, fault)) if fault else containers.append(name)
    skipped += [Skipped(name, "a compressed tar; decompress it") for name in names
                if name.lower().endswith(_COMPRESSED)]
    inside, left_out = _find_in_archives(root, containers)
    return _some(root, items + inside, skipped + left_out)


def _item(root: pathlib.Path, name: str, listed: tuple[str, str] | None,
          real_root: str) -> Item | str:
    """The item of a file that is there, or why there is none."""
    path = root / name
    fault, size = _state(path, name, real_root)
    if fault:
        return fault
    if path.suffix.lower() not in MEDIA:
        return f"not one of {' '.join(MEDIA)}"
    if listed:
        caption, group = listed
    else:
        (caption, why), group = _caption_beside(path), path.stem
        if caption is None:
            return why
    return Item(name, " ".join(caption.split()), group, size=size)


def _state(path: pathlib.Path, name: str, real_root: str) -> tuple[str, int]:
    """(why a path is no file of the folder, or "", its bytes)."""
    if not is_text(name):
        return "its name is not UTF-8; rename it", 0
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "no such file", 0
    except OSError as error:
        if passes(error) and not isinstance(error, PermissionError):
            raise disk_error(error, path, "read") from None
        return f"cannot be read: {error.strerror}", 0
    if not stat.S_ISREG(found.st_mode):
        return "is no file", 0
    if not pathlib.Path(os.path.realpath(path)).is_relative_to(real_root):
        return "a link out of the folder", 0
    return "", found.st_size


def fetch(source: pathlib.Path, item: Item) -> File:
    """Where the decoder finds an item of `source`: a path, or a place or bytes in an archive."""
    if not item.archive:
        return source / item.name
    path = base(source) / item.archive
    member = item.name[len(item.archive) + 1 :]
    if item.column:
        return tables.read_row(path, member, item.place, item.column)
    return Member(member, path, item.place, item.size)


def base(source: pathlib.Path) -> pathlib.Path:
    """The folder that names are relative to: the source, or that of the one archive."""
    return source.parent if source.is_file() else source


def _find_in_archives(root: pathlib.Path, names) -> tuple[list[Item], list[Skipped]]:
    items, skipped = [], []
    for name in names:
        path = root / name
        with disk_errors(path, "read"):
            try:
                rows, left_out = _list(path)
            except PermissionError as error:
                skipped.append(Skipped(name, f"cannot be read: {error.strerror}"))
                continue
        for member, caption, group, *rest in rows:
            if is_text(member + caption + group):
                items.append(Item(f"{name}/{member}", " ".join(caption.split()), group, name,
                                  *rest))
            else:
                left_out.append((member, "its name or caption holds half a character"))
        skipped += [Skipped(f"{name}/{place}".rstrip("/"), reason) for place, reason in left_out]
    return items, skipped


def _list(path: pathlib.Path) -> tuple[list[tuple], list[tuple[str, str]]]:
    """([(member, caption, group, place, size, column)], [(member, why it is left out)])."""
    if path.suffix.lower() == tables.SUFFIX:
        size = path.stat().st_size
        rows, left_out = tables.list_table(path)
        return [(*row[:4], size, row[4]) for row in rows], left_out
    rows, left_out = archives.list_tar(path)
    return [(*row, "") for row in rows], left_out


def _some(root, items, skipped):
    # Names that are not UTF-8 are shown as they can be written.
    skipped = [dataclasses.replace(s, name=s.name.encode("utf-8", "backslashreplace").decode())
               for s in skipped]
    if not items:
        first = f"{skipped[0].name}: {skipped[0].reason}" if skipped else ""
        reason = f"; the first of {len(skipped)} left out: {first}" if skipped else ""
        formats = ", ".join(suffix[1:] for suffix in MEDIA)
        raise UserError(f"{root} holds no captioned image or video{reason}; give {formats} with "
                        "captions in metadata.jsonl or in a .txt beside each file")
    return items, skipped


def _walk(root: pathlib.Path, ignore: pathlib.Path) -> tuple[list[str], list[Skipped]]:
    """Names of all media (read or not) and archives under root, and folders not searched."""
    names, skipped = [], []
    wanted = (*MEDIA, *UNREAD, *ARCHIVES, *_COMPRESSED)
    real_ignore = os.path.realpath(ignore)

    def relative(path: str) -> str:
        return pathlib.Path(path).relative_to(root).as_posix()

    def unread(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise disk_error(error, root, "read")
        skipped.append(Skipped(relative(error.filename), "a folder that cannot be read: "
                                                         f"{error.strerror}"))

    for here, folders, files in os.walk(root, onerror=unread):
        search = []
        for folder in sorted(f for f in folders if not f.startswith(".")):
            path = os.path.join(here, folder)
            if os.path.realpath(path) == real_ignore:
                continue
            if os.path.islink(path):
                skipped.append(Skipped(relative(path), "a link to a folder: links to folders are "
                                                       "not followed"))
            else:
                search.append(folder)
        folders[:] = search
        names += [relative(os.path.join(here, file)) for file in files
                  if file.lower().endswith(wanted) and not file.startswith(".")]
    return names, skipped


def _caption_beside(path: pathlib.Path) -> tuple[str | None, str]:
    """(the text of the .txt beside a file, or None and why there is none)."""
    beside = path.with_suffix(".txt")
    with disk_errors(beside, "read"):
        try:
            with open(beside, encoding="utf-8-sig") as file:
                return file.read(_TEXT_LIMIT), ""
        except (FileNotFoundError, IsADirectoryError):
            return None, "no caption: not in the table and no .txt beside it"
        except (PermissionError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            return None, f"no caption: its .txt cannot be read ({reason})"
