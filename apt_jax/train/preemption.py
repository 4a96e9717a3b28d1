"""SIGTERM and SIGINT end a run after the step in hand."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax


class Preemption:
    """`with Preemption() as stop: ... if stop.asked(step): save and leave`.

    The first signal is noted, a second one has its usual effect. With several processes the
    coordination service of jax.distributed hears SIGTERM and sees to it that all leave at the same
    step; a first SIGINT is passed on to it as one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self._name = ""
        self._before: dict[int, Any] = {}
        self._distributed = jax.process_count() > 1

    def __enter__(self) -> Preemption:
        # Python runs handlers in the main thread only; a notebook's worker thread has none.
        if threading.current_thread() is threading.main_thread():
            self._before = ({signal.SIGINT: signal.signal(signal.SIGINT, self._pass_on)}
                            if self._distributed else
                            {s: signal.signal(s, self._note) for s in self.SIGNALS})
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _note(self, number: int, _frame: Any) -> None:
        self._name = signal.Signals(number).name
        self._restore()

    def _pass_on(self, _number: int, _frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def asked(self, step: int) -> str:
        """The signal's name once one has come, else ""."""
        if self._distributed:
            from jax.experimental import multihost_utils

            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._name
