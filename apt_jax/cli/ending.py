"""How a process ends: its exit status, told to whoever started it even where jax or srun would not.

With APT_JAX_STATUS=FOLDER in the environment (launch/slurm.sbatch sets it) a status is left there
too, in a file of this process's own: srun tells only the highest of its tasks', which is that of
the tasks it killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from apt_jax.errors import UserError

FOLDER = "APT_JAX_STATUS"
WRONG, CRASHED = 2, 1


def left(status: int) -> int:
    """Leaves the status in $APT_JAX_STATUS, where that is set, and returns it."""
    if folder := os.environ.get(FOLDER):
        try:
            (Path(folder) / f"{socket.gethostname()}-{os.getpid()}").write_text(f"{status}\n")
        except OSError as error:
            print(f"apt-jax: cannot leave the status in {folder} ({error.strerror})",
                  file=sys.stderr)
    return status


def complain(error: UserError) -> None:
    """The one line of a UserError, on stderr."""
    print(f"apt-jax: {error}", file=sys.stderr, flush=True)


_LESS = {
    "train": "lower train.batch_size, raise train.accumulate, or set model.remat=full",
    "sample": "give a smaller --height and --width, or fewer prompts at a time",
}


def memory_error(error: BaseException, command: str) -> UserError | None:
    """What to do where a device or the host has no room for `command`; None for another error."""
    text = str(error)
    exhausted = (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text
                 and "hared memory" not in text)  # a kernel's own memory: a defect, not the sizes
    if not exhausted and not isinstance(error, MemoryError):
        return None
    said = (text.splitlines() or [""])[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
    less = _LESS.get(command, "ask for less at a time, or use a device with more")
    return UserError(f"there is too little memory{said and f' ({said:.120})'}; {less}")


def leave_job(error: BaseException) -> NoReturn:
    """Says what happened and ends this process of a job now: status 2 for a UserError, else 1.

    jax's own way out waits for all processes, five minutes, and then aborts: the others wait in a
    collective for this one, and the launcher would be told of the abort only.
    """
    if isinstance(error, UserError):
        complain(error)
    elif line := memory_error(error, "train"):
        complain(line)
    else:
        traceback.print_exception(error)
    leave_with(WRONG if isinstance(error, UserError) else CRASHED)


def leave_with(status: int) -> NoReturn:
    """Ends this process now, with what else runs in it."""
    left(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
