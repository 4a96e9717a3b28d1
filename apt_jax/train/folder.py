"""The run folder while a run is in it: one run at a time, and no folder of a refused start."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import jax

from apt_jax.errors import UserError
from apt_jax.weights import CHECKPOINTS

try:
    import fcntl
except ImportError:  # no POSIX: no lock either
    fcntl = None

LOCK = ".training.lock"  # "PID HOST BOOT" of who trains, while it does
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one for every start of a machine
# What was killed here is gone at once; a network disk keeps the lock of a host that was lost for
# a while, and the job that starts again elsewhere must not take that for a wrong command.
SECONDS_HERE, SECONDS_ELSEWHERE, POLL = 3.0, 120.0, 0.2


class RunFolder:
    """`with RunFolder(workdir): ...`, in which no other run writes there; process 0 sees to it.

    Two runs in one folder delete each other's half-written checkpoints. The lock is the system's
    (flock), so that a killed process leaves none; where a disk has no locks, the run goes on
    without. At the end what was made and stayed empty goes away: a start that is refused (no such
    data, no such weights) has made WORKDIR/checkpoints by then, as if the run had begun.

    UserError on entering where another run holds the folder.
    """

    def __init__(self, workdir: Path):
        self._name, self._workdir = workdir, workdir.absolute()
        self._first = jax.process_index() == 0
        self._made: list[Path] = []  # innermost first
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        if self._first:
            # os.path: a name that is too long is an error to Path, and Checkpoints tells of it.
            self._made = [folder for folder in (self._workdir / CHECKPOINTS, self._workdir,
                                                *self._workdir.parents)
                          if not os.path.exists(folder)]
            self._take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self._workdir / LOCK).unlink()
            os.close(self._lock)
        for folder in self._made:
            with contextlib.suppress(OSError):  # something lies in it, or it was never made
                folder.rmdir()

    def _take(self) -> None:
        begun, told = time.monotonic(), False
        while (holder := self._try()) is not None:
            pid, host, boot = (*holder.split(), "", "", "")[:3]
            here = not host or boot == _boot()  # pods keep their names when they move
            if time.monotonic() - begun >= (SECONDS_HERE if here else SECONDS_ELSEWHERE):
                who = f" (pid {pid} on {host})" if host else ""
                raise UserError(f"another process{who} trains in {self._name}; wait for its end, "
                                "or use another --workdir")
            if not here and not told:
                told = True
                print(f"{self._name} is held by pid {pid} on {host}; waiting up to "
                      f"{SECONDS_ELSEWHERE:.0f} s, as that host may be gone", file=sys.stderr,
                      flush=True)
            time.sleep(POLL)

    def _try(self) -> str | None:
        """What the file of another holder says; None once the lock is taken or cannot exist."""
        if fcntl is None:
            return None
        path, file = self._workdir / LOCK, None
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file), os.stat(path)):
                raise FileNotFoundError  # its holder has just ended, and taken it away
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()} {socket.gethostname()} {_boot()}\n".encode())
        except (BlockingIOError, FileNotFoundError):
            if file is None:
                return None
            said = os.pread(file, 300, 0).decode(errors="replace")
            os.close(file)
            return said
        except OSError:  # what is wrong with the folder itself, the run will say
            if file is not None:
                os.close(file)
            return None
        self._lock = file
        return None


def _boot() -> str:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:  # not Linux: the name has to do
        return socket.gethostname()
