"""SIGTERM and SIGINT end a run after the step in hand, and at once before the first one."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax


class Preemption:
    """`with Preemption() as stop: ... if stop.asked(step): save and leave`.

    The first signal is noted, a second one has its usual effect. With several processes the
    coordination service of jax.distributed hears SIGTERM and sees to it that all leave at the same
    step; a first SIGINT is passed on to it as one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, early: Callable[[str], None] | None = None):
        """early: takes the name of a signal that comes before `updates()`, and ends the process.

        It runs in a thread: Python's handlers wait for the main thread, which compiles for minutes
        by then. Without it, and with several processes, which would have to agree, such a signal
        waits for the step like any other.
        """
        self._name = ""
        self._before: dict[int, Any] = {}
        self._distributed = jax.process_count() > 1
        self._early = None if self._distributed else early
        self._lock = threading.Lock()
        self._wake: socket.socket | None = None  # where the interpreter writes signals' numbers

    def __enter__(self) -> Preemption:
        # Python runs handlers in the main thread only; a notebook's worker thread has none.
        if threading.current_thread() is threading.main_thread():
            if self._early is not None:
                self._listen()
            self._before = ({signal.SIGINT: signal.signal(signal.SIGINT, self._pass_on)}
                            if self._distributed else
                            {s: signal.signal(s, self._note) for s in self.SIGNALS})
        return self

    def __exit__(self, *_: Any) -> None:
        self.updates()
        self._restore()

    def updates(self) -> None:
        """The first update is made: from now on a signal has something to save."""
        with self._lock:
            self._early = None
        if self._wake is not None:
            signal.set_wakeup_fd(self._woken)
            self._wake.close()
            self._wake = None

    def _listen(self) -> None:
        ear, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._woken = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(ear,), daemon=True).start()

    def _hear(self, ear: socket.socket) -> None:
        with ear:
            while number := ear.recv(1):  # nothing once the other end is closed
                if number[0] in self.SIGNALS:
                    with self._lock:
                        if self._early is not None:
                            self._early(signal.Signals(number[0]).name)
                    return

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
