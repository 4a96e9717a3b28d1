"""The run folder while a run is in it: folders that a refused start made do not stay."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax

from apt_jax.weights import CHECKPOINTS


class RunFolder:
    """`with RunFolder(workdir): ...` takes away at the end what was made and stayed empty.

    A start that is refused (no such data, no such weights) has made WORKDIR/checkpoints by then,
    and what was to be a new run looks like one that has begun. Process 0 alone sees to it.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir.absolute()
        self._first = jax.process_index() == 0
        self._made: list[Path] = []  # innermost first

    def __enter__(self) -> RunFolder:
        if self._first:
            # os.path: a name that is too long is an error to Path, and Checkpoints tells of it.
            self._made = [folder for folder in (self._workdir / CHECKPOINTS, self._workdir,
                                                *self._workdir.parents)
                          if not os.path.exists(folder)]
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # something lies in it, or it was never made
                folder.rmdir()
