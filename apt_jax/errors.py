"""What is meant for a user's eyes: the one exception, how an OSError becomes it, and which pass."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a shape that does not fit.

    The message is one line, says what is wrong and, after a semicolon, how to mend it. The
    command line prints it as it is and exits with status 2; nothing in the package catches it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


_TEMPORARY = re.compile(r"(?<![^/])\.([^/]+?)\.\d+(?:\.old)?\.tmp(?![^/])")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEND = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or use another folder"),
    errno.EROFS: "use a folder that can be written",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY),
                    "a file lies where a folder is needed, or the reverse; give another path"),
    errno.ENAMETOOLONG: "give a shorter path",
    **dict.fromkeys((errno.ENOENT, errno.ELOOP, errno.EINVAL), "check the path"),
    **dict.fromkeys((errno.EBUSY, errno.EXDEV), "give a folder inside it, not a disk's root"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
}


def disk_error(error: OSError, path: Any, doing: str = "written") -> UserError:
    """An OSError of a disk as one line for the user.

    Args:
      path: what the user named; it stands where the error names no file.
      doing: what could not be done to it: "written" or "read".
    """
    if error.errno in _FULL:
        return UserError(f"no space left while writing {_final(path)}; free some, or write to "
                         "another disk")
    where = _final(error.filename if isinstance(error.filename, str) else path)
    mend = _MEND.get(error.errno, "check the disk, then repeat the command")
    return UserError(f"{where} cannot be {doing} ({error.strerror or error}); {mend}")


# What a disk, a network file system or a busy machine says of a file that may be whole.
_PASSING = frozenset(getattr(errno, name) for name in (
    "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "EMFILE", "ENFILE", "ENOMEM",
    "EACCES", "ENOENT", "ENODEV", "ENXIO", "EREMOTEIO", "ENOLINK", "ECOMM", "ENOTCONN",
    "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
    "ENETUNREACH", "ENETRESET", "EKEYEXPIRED") if hasattr(errno, name))
# TensorStore, which reads and writes for Orbax, raises ValueErrors that name the cause so.
_CODE = re.compile(r"\[os_error_code='(\d+)'")


def os_error(error: Exception) -> OSError | None:
    """The OSError that this error is, or that its words name; None for any other."""
    if isinstance(error, OSError):
        return error
    code = _CODE.search(str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def passes(error: Exception) -> bool:
    """Whether the same file may be read without this error later: nothing says it is damaged."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # a device's memory
        return True
    cause = os_error(error)
    return cause is not None and cause.errno in _PASSING


def _final(path: Any) -> str:
    """A path whose temporary parts, .NAME.PID.tmp, have the name that they are written for."""
    return _TEMPORARY.sub(r"\1", str(path))


@contextmanager
def disk_errors(path: Any, doing: str = "written") -> Iterator[None]:
    """Turns the block's OSErrors into `disk_error`s; those of pipes and sockets go through."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        raise disk_error(error, path, doing) from error
