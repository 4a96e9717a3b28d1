"""What a run writes about itself: a progress line, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO


def truncate_lines(path: Path, last_step: int) -> None:
    """Drops the lines of metrics.jsonl after `last_step` (and a torn last line), atomically.

    A resumed run repeats the steps after its checkpoint: without this their lines were doubled.
    """
    if not path.exists():
        return
    kept = []
    # A damaged byte costs its line, not the run.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


class MetricLog:
    """metrics.jsonl and tensorboard/ of a run folder (written by process 0 only)."""

    def __init__(self, workdir: Path, start_step: int, writes: bool = True):
        """Opens both; lines after `start_step` from an earlier attempt are removed."""
        self._file: IO[str] | None = None
        self._board = None
        if not writes:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        truncate_lines(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1,
                                    max_queue=1000, flush_secs=30)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of scalars, flushed."""
        if self._file is None:
            return
        line = {"step": step, **{name: _short(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _short(value: float) -> float:
    return float(f"{value:.6g}")


class Progress:
    """A bar on a terminal, plain lines elsewhere; both with the rate and the time left.

    The clock of the rate starts after a step that had to be compiled: minutes of it, counted as a
    step's time, made years of the time that is left.
    """

    def __init__(self, total: int, start: int, label: str, shows: bool = True,
                 stream: IO[str] | None = None, every_seconds: float = 10.0):
        self._stream = sys.stderr if stream is None else stream
        self._total, self._label = total, label
        self._shows, self._every = shows, every_seconds
        self._printed = time.monotonic()
        self._step, self._note = start, ""
        self._from = start, None  # the step and the time from which the rate counts
        self._bar = None

    def compiles(self, what: str) -> None:
        """The next step has to be compiled; says so."""
        if self._bar is not None:  # it would count it; the next one takes its line after it
            self._bar.leave = False
            self.close()
        self._from = self._step, None
        if self._shows:
            print(f"{self._label}: compiling {what}", file=self._stream, flush=True)

    def update(self, step: int, note: str | None = None) -> None:
        """Tells the last finished step and, when new, the numbers to show beside it."""
        advance, self._step = step - self._step, step
        self._note = self._note if note is None else note
        now = time.monotonic()
        if self._from[1] is None:
            self._from = step, now
            self._open_bar()
        elif self._bar is not None:
            self._bar.update(advance)
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
        elif self._shows and (now - self._printed >= self._every or step == self._total):
            self._printed = now
            self._print_line(now)

    def _open_bar(self) -> None:
        if self._shows and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=self._step, desc=self._label, unit="step",
                             file=self._stream, dynamic_ncols=True, smoothing=0.05)

    def _print_line(self, now: float) -> None:
        done, seconds = self._step - self._from[0], now - self._from[1]
        rate = done / max(seconds, 1e-9)
        parts = [f"{self._label}: step {self._step}/{self._total}"]
        if done:
            parts.append(f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.2f} s/step")
            parts.append(f"{_clock((self._total - self._step) / rate)} left")
        print(", ".join(parts + [self._note] * bool(self._note)), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own that does not tear the bar; also where no progress is shown."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _clock(seconds: float) -> str:
    """90 -> "1:30", 3690 -> "1:01:30"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
