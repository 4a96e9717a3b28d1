"""Ends a process whose step hangs, with the stacks of all its threads.

A process that waits in a collective for one that is gone waits for ever, holding its devices. The
scheduler (or launch/local.py) restarts what exits. The timer is faulthandler's: it needs neither
the interpreter lock nor a Python thread, so it works while jax blocks in C++.
"""

from __future__ import annotations

import faulthandler
import sys
from types import TracebackType

# What takes long by itself: a new batch shape compiles, the first step waits for everyone to come
# up, and a whole state is read or written.
SLOW_SECONDS = 3600.0


class Watchdog:
    """`with Watchdog(seconds) as dog: ... dog.alive()` once a step; exits with status 1 when late.

    seconds: 0 watches nothing.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> Watchdog:
        self.alive(slowly=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self, slowly: bool = False) -> None:
        """Something got on; `slowly`: what comes next may take an hour (SLOW_SECONDS)."""
        if not self._seconds:
            return
        limit = max(self._seconds, SLOW_SECONDS) if slowly else self._seconds
        # sys.__stderr__: a test or a notebook may have put something without a file in its place.
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
