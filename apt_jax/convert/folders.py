"""Folders that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from apt_jax.errors import UserError, disk_errors


@contextmanager
def new_folder(target: Path | str, overwrite: bool = False,
               inputs: Sequence[Path | str | None] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is removed if not.

    inputs: what is read meanwhile; the target must not replace any of it.
    UserError when the target holds something and `overwrite` is not set, or the disk is full.
    """
    target = Path(target)
    place = target.resolve()
    for source in filter(None, inputs):
        read = Path(source).resolve()
        if read.exists() and (place == read or place in read.parents):
            raise UserError(f"--to {target} would replace {source}, which is read; give another --to")
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise UserError(f"{target} is there already; give another --to, or --overwrite")
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(target):
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            if target.exists():
                os.replace(target, old)
            os.replace(part, target)
            if old.exists():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        finally:
            shutil.rmtree(part, ignore_errors=True)


def check_space(target: Path | str, needs: int) -> None:
    """UserError when the disk of `target` has fewer than `needs` bytes free."""
    folder = Path(target).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needs:
        raise UserError(f"{target} needs {needs / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB "
                        "free; free some, or write to another disk")


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
