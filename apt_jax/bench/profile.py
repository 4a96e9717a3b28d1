"""Where a call's time goes on the device: a trace by jax's profiler, read with Python alone.

The profiler writes Chrome's trace format. Its events are grouped by process (a device) and thread
(a stream of it); a GPU's kernels lie on its streams, a TPU's operations on "XLA Ops". A CPU's
operations lie among what the host does and name the instruction they run; a loop holds those of its
body.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from apt_jax.bench.report import in_a_line

CALLS, COSTLIEST = 3, 10


def folder_of(folder: str | Path | None, name: str) -> Path | None:
    """A row's own folder: the start of its name, with what no file system minds, and a digest."""
    if not folder:
        return None
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return Path(folder) / f"{re.sub(r'[^A-Za-z0-9_.=,-]+', '_', name)[:80]}_{digest}"


def profiled(call: Callable[..., Any], inputs: Sequence[tuple], wait: Callable[[Any], Any],
             folder: Path | None, calls: int = CALLS) -> dict[str, Any]:
    """Traces `calls` calls into `folder` (none: no trace, {}).

    Returns "device_seconds", during which the device computed, and "costliest", the kernels that
    took longest: [name, seconds, runs]. All of one call. Where the profiler fails, "trace_error"
    says why: what was timed before stands.
    """
    if folder is None:
        return {}
    try:
        return _profiled(call, inputs, wait, folder, calls)
    except Exception as error:
        return {"device_seconds": None, "costliest": [], "trace_error": in_a_line(error)}


def _profiled(call: Callable[..., Any], inputs: Sequence[tuple], wait: Callable[[Any], Any],
              folder: Path, calls: int) -> dict[str, Any]:
    wait(call(*inputs[0]))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    before = set(_traces(folder))
    with jax.profiler.trace(str(folder), profiler_options=options):
        for i in range(calls):
            result = call(*inputs[i % len(inputs)])
        wait(result)
    found = [event for path in set(_traces(folder)) - before for event in read(path)]
    if not found:
        raise ValueError("the trace has nothing that ran on a device")
    return summary(found, calls)


def _traces(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.trace.json.gz")) if folder.is_dir() else []


def read(path: Path) -> list[tuple[str, float, float]]:
    """(name, start, seconds) of what ran on devices; of XLA's operations on a CPU, whose numbers
    ("dot.162") are left out: there are hundreds, and only their kinds add up to something."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    lines = _lines(processes, threads)
    return [(event["name"] if lines else re.sub(r"[.\d]+$", "", event["name"]), 1e-6 * event["ts"], 1e-6 * event.get("dur", 0)) for event in events
            if event.get("ph") == "X" and ((event["pid"], event["tid"]) in lines if lines else
                                           "hlo_op" in event.get("args", {}))]


def _lines(processes: dict[Any, str], threads: dict[Any, str]) -> set[Any]:
    """The threads of devices that hold each kernel once: summaries of them lie beside."""
    devices = {pid for pid, name in processes.items() if name.startswith("/device:")}
    for word in ("Stream #", "XLA Ops"):
        found = {key for key, name in threads.items()
                 if key[0] in devices and name.startswith(word)}
        if found:
            return found
    return set()


def busy(events: Iterable[tuple[str, float, float]]) -> float:
    """Seconds in which anything ran: what lies beside each other counts once."""
    total, end = 0.0, float("-inf")
    for _, start, seconds in sorted(events, key=lambda event: event[1]):
        total += max(0.0, start + seconds - max(start, end))
        end = max(end, start + seconds)
    return total


def summary(events: Sequence[tuple[str, float, float]], calls: int) -> dict[str, Any]:
    """See `profiled`."""
    took: dict[str, list[float]] = collections.defaultdict(list)
    for name, _, seconds in events:
        took[name].append(seconds)
    first = sorted(took.items(), key=lambda item: -sum(item[1]))[:COSTLIEST]
    return {"device_seconds": busy(events) / calls,
            "costliest": [[name[:120], sum(each) / calls, len(each) / calls]
                          for name, each in first]}
