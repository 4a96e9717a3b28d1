"""A progress line for slow loops of the evaluation: count, rate, time left."""

import sys
import time


def duration(seconds: float) -> str:
    """Seconds as people write them: 0.42 s, 8.1 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Context manager that keeps one line on stderr up to date, e.g.

        features of apt_1:  640/1494 frames, 812 frames/s, 1.1 s left

    An empty label shows nothing but still measures `rate`. Where stderr is no terminal only the
    last line is written, so logs stay short.
    """

    def __init__(self, total: int, label: str = "", unit: str = "items"):
        self.total, self.label, self.unit = total, label, unit
        self.done, self._shown = 0, 0.0

    def __enter__(self) -> "Progress":
        self._start = time.perf_counter()
        return self

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def advance(self, count: int) -> None:
        self.done += count
        now = self.seconds
        if self.label and sys.stderr.isatty() and now - self._shown > 0.2:
            self._shown = now
            left = (self.total - self.done) * now / max(self.done, 1)
            self._write(f"{self.done / max(now, 1e-9):.3g} {self.unit}/s, {duration(left)} left")

    def _write(self, rest: str, end: str = "") -> None:
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rest}"
        if sys.stderr.isatty():
            line = f"\r{line[:118]:<118}"
        print(line, end=end, file=sys.stderr, flush=True)

    def __exit__(self, *error) -> None:
        elapsed = self.seconds
        self.rate = self.done / max(elapsed, 1e-9)
        if self.label:
            self._write(f"{self.rate:.3g} {self.unit}/s, {duration(elapsed)}", end="\n")
