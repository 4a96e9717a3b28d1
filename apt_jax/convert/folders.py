"""Folders that are whole or not there: written beside their place, then renamed into it.

A finished one holds a hidden list of its files, FILES. What lies in a folder and is in no list is not
ours to remove, whatever --overwrite says.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from apt_jax.errors import UserError, disk_errors
from apt_jax.tensor_files import write_json

FILES = ".apt_jax_convert.json"  # {"files": [relative paths]}
_PASSING = ("__pycache__", ".DS_Store", ".cache")  # what looking at a folder leaves in it


@contextmanager
def new_folder(target: Path | str, overwrite: bool = False,
               inputs: Sequence[Path | str | None] = (), needs: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is removed if not.

    Beside the target it is hidden and locked, so that what a killed process left is known from
    what another one is still writing: the former is removed here.

    Args:
      inputs: what is read meanwhile; the target must not replace any of it.
      needs: bytes that will be written.

    Raises:
      UserError: the target holds something and `overwrite` is not set, or something that was not
      written here; it is the working directory or a disk's root; the disk has not the space or
      cannot be written.
    """
    target = Path(target)
    with disk_errors(target):
        place = _place(target, overwrite, inputs)
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(place)
        _check_space(target, place.parent, needs)
        part = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        _remove(part)
        part.mkdir()
        lock = _locked(part)
        try:
            yield part
            write_json(part / FILES, {"files": sorted(_files(part))})
            _place(target, overwrite, inputs)  # again: another process may have been faster
            _swap(part, place)
        finally:
            _remove(part)
            os.close(lock)


def _place(target: Path, overwrite: bool, inputs: Sequence[Path | str | None]) -> Path:
    """Where the target is without links; UserError where nothing may be written."""
    place, here = Path(os.path.realpath(target)), Path.cwd()  # resolve() raises for loops
    for source in filter(None, inputs):
        read = Path(os.path.realpath(source))
        if read.exists() and (place == read or place in read.parents):
            raise UserError(f"--to {target} would replace {source}, which is read; give another "
                            "--to")
        if read in place.parents and (place.is_file() or place.is_dir() and any(place.iterdir())):
            raise UserError(f"--to {target} is a part of {source}, which is read; give another "
                            "--to, or remove it first")
    if place == here or place in here.parents:
        raise UserError(f"--to {target} would replace the folder you are in; give a folder inside "
                        "it, or go elsewhere first")
    if place.is_mount():
        raise UserError(f"--to {target} is the root of a disk, which cannot be replaced; give a "
                        "folder inside it")
    if place.exists() and (not place.is_dir() or any(place.iterdir())) and not overwrite:
        raise UserError(f"{target} is there already; give another --to, or --overwrite")
    if foreign := _foreign(place):
        raise UserError(f"{target} holds files that convert did not write ({foreign}); give another "
                        "--to, or move them elsewhere first")
    return place


def _files(folder: Path) -> list[str]:
    """Relative paths of all that is no folder; links to folders are followed nowhere."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_symlink() or not path.is_dir()]


def _foreign(place: Path) -> str:
    """The first file of a place that is in no list of ours, and how many more; "" without any."""
    if not place.is_dir():
        return place.name if place.exists() else ""
    try:
        ours = set(json.loads((place / FILES).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):  # no list, or not one of ours
        ours = set()
    names = sorted(name for name in _files(place) if name not in ours | {FILES}
                   and not set(Path(name).parts) & set(_PASSING))
    return "" if not names else names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def _swap(part: Path, place: Path) -> None:
    """Puts `part` in the place of what is there; that stays where the disk refuses."""
    old = part.with_suffix(".old.tmp")
    if place.exists():
        os.replace(place, old)
    try:
        os.replace(part, place)
    except OSError:
        if old.exists():
            os.replace(old, place)
        raise
    _remove(old)


def _locked(folder: Path) -> int:
    """A handle that holds a folder's lock until it is closed, where the disk knows locks."""
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _remove_stale(place: Path) -> None:
    """Removes the temporary folders of this target that no living process holds."""
    ours = re.compile(rf"\.{re.escape(place.name)}\.\d+(\.old)?\.tmp")
    for path in place.parent.iterdir():
        if not ours.fullmatch(path.name):
            continue
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        except OSError:  # in use, or on a disk without locks: nobody takes it for the result
            pass
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_space(target: Path, folder: Path, needs: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needs:
        unit, name = (1e9, "GB") if needs >= 1e8 else (1e6, "MB")
        raise UserError(f"{target} needs {needs / unit:.1f} {name} and its disk has "
                        f"{free / unit:.1f} {name} free; free some, or write to another disk")


def bring(source: Path, target: Path, copy: bool = False) -> None:
    """A hard link to a file (through symbolic links), or a copy where that cannot be made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another disk, or one that knows no links
            pass
    shutil.copyfile(source, target)
