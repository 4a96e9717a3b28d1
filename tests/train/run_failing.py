"""`apt-jax train` of which process 1 has a fault of its own: FAULT, then the command's arguments.

    user, crash     it raises a UserError, or an OSError, while process 0 waits for it in vain
    unmounted       it has another folder under the name --workdir
"""

import os
import sys
import time

from apt_jax.cli.main import main
from apt_jax.errors import UserError
from apt_jax.train import distributed, loop

FAULTS = {"user": UserError("no data set at /data/clips on this host"),
          "crash": OSError("stale file handle")}


def broken(error):
    def train(*_args, **_kwargs):
        if os.environ["APT_JAX_PROCESS"] == "1":
            time.sleep(0.5)
            raise error
        time.sleep(600)

    return train


if __name__ == "__main__":
    fault, *arguments = sys.argv[1:]
    distributed.SEEN_SECONDS = 1.0
    if fault in FAULTS:
        loop.train = broken(FAULTS[fault])
    elif os.environ["APT_JAX_PROCESS"] == "1":
        arguments[arguments.index("--workdir") + 1] += "_unmounted"
    sys.exit(main(arguments))
