"""Makes rows one after another: one that breaks its process or its device holds up no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.bench.report import Results, read, write

# (name, digest of the config, what makes the row: `report.attempt` inside)
Todo = Iterable[tuple[str, str, Callable[[], dict[str, Any]]]]
CUT_OFF = "its process ended before it was done"


class DeviceLost(Exception):
    """A row broke the device for this process: nothing more can run in it."""


_keeping: list[Callable[[dict[str, Any]], None]] = []  # where the row that is made goes


def keep(row: Mapping[str, Any]) -> None:
    """Called while a row is made: what it has so far stands, whatever becomes of the rest.

    A trace may end the process, and what a block is compared with may not fit the device: the time
    that was measured before is kept, with "incomplete" and why.
    """
    for take in _keeping[-1:]:
        take(dict(row))


@contextlib.contextmanager
def _kept_by(take: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    _keeping.append(take)
    try:
        yield
    finally:
        _keeping.pop()


class Enough(Exception):
    """As many rows as were asked for are made, and others are missing."""


def make_rows(todo: Todo, results: Results, tell: Callable[[str, dict[str, Any]], None],
              most: int = 0) -> int:
    """Makes the rows that are missing and keeps each at once; tell(name, row) of each.

    What failed before, or was under way when its process ended, comes last. most: of rows that were
    never tried, 0 for all; what failed before is tried again by who finds no other, so that an end
    comes. Returns how many failed; raises `DeviceLost` where after a failure the device does nothing
    more, `Enough` where `most` are made and another is missing.
    """
    failed, late, made = 0, [], 0

    def one(name: str, config: str, make: Callable[[], dict[str, Any]]) -> None:
        nonlocal failed
        older = results.rows.get(name, {})  # of other sources: a time, until there is a new one
        older = older if "median" in older else older.get("before")
        before = {"before": older} if older else {}
        results.add(name, {"error": CUT_OFF, **before}, config)  # where the process ends in this row
        so_far: dict[str, Any] = {}

        def take(part: dict[str, Any]) -> None:
            so_far.update(part)
            results.add(name, part | {"incomplete": CUT_OFF}, config)

        with _kept_by(take):
            row = make()
        if "error" in row and so_far:
            row = so_far | {"incomplete": row["error"]}
        results.add(name, row | before if "error" in row else row, config)
        tell(name, row)
        failed += "error" in row
        if ("error" in row or "incomplete" in row) and not device_works():
            raise DeviceLost(f"the device is lost for this process after {name}")

    for name, config, make in todo:
        if results.has(name, config):
            continue
        if results.failed(name, config):
            late.append((name, config, make))
            continue
        if most and made == most:
            raise Enough
        one(name, config, make)
        made += "skipped" not in results.rows[name]
    if most and made and late:
        raise Enough
    for each in late:
        one(*each)
    return failed


def device_works() -> bool:
    """Whether the first device still computes: an illegal access ends that for the process."""
    try:
        return float(jax.device_put(jnp.float32(1), jax.devices()[0]) + 1) == 2
    except RuntimeError:  # jax's own errors are such; anything else is a bug and is shown
        return False


def cut_off(path: Path) -> set[str]:
    """Names of a file's rows in which a process ended; none where there is no file."""
    rows = read(path)["rows"] if path.is_file() else {}
    return {name for name, row in rows.items() if row.get("error") == CUT_OFF}


def forget(path: Path, names: Collection[str]) -> None:
    """Takes rows out of a file: they are missing then, or as they were, and come in their turn."""
    if names:
        found = read(path)
        found["rows"] = {name: row["before"] if name in names else row
                         for name, row in found["rows"].items()
                         if name not in names or "before" in row}
        write(path, found)
