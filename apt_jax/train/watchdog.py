"""Ends a process whose step hangs, with the stacks of all its threads.

A process that waits in a collective for one that is gone waits for ever, holding its devices. The
scheduler (or launch/local.py) restarts what exits. The timer is faulthandler's: it needs neither
the interpreter lock nor a Python thread, so it works while jax blocks in C++.

A step of a demo takes a second, one of the paper's batches of clips on eight GPUs hours: how long
is too long follows from the steps that were seen.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from types import TracebackType


class Watchdog:
    """`with Watchdog(seconds, slow) as dog: ... dog.step()` once a step; status 1 when late.

    Args:
      seconds: what a step may take beyond twice the slowest one seen; 0 watches nothing.
      slow: seconds for what is not like the steps before: the first step of a batch's shape, which
        compiles and waits for everyone to come up, reading or writing a whole state, and pictures.
    """

    def __init__(self, seconds: float, slow: float):
        self._seconds, self._slow = seconds, slow
        self._slowest = 0.0
        self._begun: float | None = None  # when the step began that is under way, None in between
        self._new = 0  # steps that may still be a new shape's

    def __enter__(self) -> Watchdog:
        self.slowly()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def step(self, new: bool = False) -> None:
        """A step begins; `new`: the first of its shape. The loop waits for a step while the next
        one is under way, so a new one has the time of two."""
        self._ended()
        self._begun = time.monotonic()
        self._new = 2 if new else max(0, self._new - 1)
        limit = self._seconds + 2 * self._slowest
        self._wait(max(self._slow, limit) if self._new else limit)

    def slowly(self) -> None:
        """What comes next is no step; one that was under way has ended."""
        self._ended()
        self._wait(max(self._slow, self._seconds + 2 * self._slowest))

    def _ended(self) -> None:
        if self._begun is not None:
            self._slowest = max(self._slowest, time.monotonic() - self._begun)
        self._begun = None

    def _wait(self, limit: float) -> None:
        if self._seconds:
            # sys.__stderr__: a test or a notebook may have put what has no file in its place.
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
