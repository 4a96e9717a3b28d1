"""A disk that does not take a run, as one line for the user.

Only what another start would not mend: a scheduler starts a crashed job again but not a wrong
command, so a stale handle of a network disk stays the crash that it is.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt_jax.errors import disk_error, os_error

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
# What only a wrong path makes of a folder that is opened.
WRONG_PATH = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.EINVAL,
              errno.ENAMETOOLONG)


@contextmanager
def run_disk(folder: Path, opening: bool = False, doing: str = "written") -> Iterator[None]:
    """Turns the block's lasting errors of a disk into UserErrors that name `folder` or the file.

    opening: the block makes the folder, so that wrong paths show.
    doing: what the disk did not let be done: "written" or "read".
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        cause = os_error(error)
        if cause is None or cause.errno not in LASTING + WRONG_PATH * opening:
            raise
        raise disk_error(cause, folder, doing) from error
