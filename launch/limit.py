"""The time that one call of a script has."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time


class Limit:
    """The time that one call has; training ends then as a scheduler would end it, by SIGTERM."""

    def __init__(self, minutes: float):  # 0: none
        self._end = time.monotonic() + 60 * minutes if minutes else math.inf

    def over(self) -> bool:
        return time.monotonic() >= self._end

    @contextlib.contextmanager
    def training(self):
        """`with limit.training(): train(...)` leaves "preempted" soon after the time is up."""
        if self._end == math.inf:
            yield
            return
        done = threading.Event()

        def ring():
            wait = max(0.0, self._end - time.monotonic())
            while not done.wait(wait):  # again: it may have come before the loop listens
                os.kill(os.getpid(), signal.SIGTERM)
                wait = 1.0

        # Outside the loop nothing has to be saved: the next look at `over` ends the call.
        before = signal.signal(signal.SIGTERM, lambda *_: None if self.over() else sys.exit(143))
        thread = threading.Thread(target=ring, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            signal.signal(signal.SIGTERM, before)
