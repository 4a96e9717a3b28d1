"""Which flags the installed XLA does not know, asked of itself in a process of its own.

No accelerator is needed: jaxlib parses the flags of GPUs on a CPU too, and libtpu reads its own
when it describes a slice that is not there. Either ends the process at a flag it does not know and
names it (XLA all of them), hence the process and the repetition.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping

from apt_jax.errors import UserError
from apt_jax.parallel.flags import (
    MANY_HOSTS,
    PLATFORMS,
    VARIABLES,
    environment_value,
    platform_flags,
)

_ASK = {
    "gpu": "import jax; jax.devices('cpu')",
    "tpu": "from jax.experimental import topologies as t; "
           "t.get_topology_desc(platform='tpu', topology_name='v5e:2x2')",
}
_UNKNOWN = re.compile(r"[Uu]nknown (?:command line )?flags? (?:in XLA_FLAGS: )?'?(?:--)?(xla_\w+)")
_SECONDS = 300


def unknown_flags(platform: str, flags: Mapping[str, str] | None = None) -> list[str]:
    """Names of the flags that the installed jaxlib ("gpu", "cuda") or libtpu ("tpu") lacks.

    Args:
      flags: {"xla_...": "value"}; default: all that the platform's files have.

    Raises:
      UserError: no libtpu, or it fails for another reason.
    """
    left = dict(platform_flags(platform, MANY_HOSTS) if flags is None else flags)
    platform = PLATFORMS[platform]
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError("only libtpu knows its flags; run: pip install 'apt_jax[plan]'")
    unknown: list[str] = []
    while message := _ask(platform, left):
        found = _UNKNOWN.search(message)
        if found is None or found.group(1) not in left:
            last = message.strip().splitlines()[-1:] or ["nothing"]
            raise UserError(f"XLA does not take the flags of {platform} and says: {last[0][:200]}")
        # XLA names all of them in one line, libtpu one.
        for name in re.findall(r"xla_\w+", message[found.start():].split("\n", 1)[0]):
            if left.pop(name, None) is not None:
                unknown.append(name)
    return unknown


def known_value(platform: str, hosts: int, say: Callable[[str], None]) -> str:
    """`environment_value` less the flags that the installed XLA lacks; all where it cannot be asked.

    say: takes a line for each flag left out, or for why it could not be asked.
    """
    unknown: list[str] = []
    try:
        unknown = unknown_flags(platform, platform_flags(platform, hosts))
    except UserError as error:
        say(str(error))
    for name in unknown:
        say(f"left out {name}: the installed XLA does not know it")
    return environment_value(platform, hosts, unknown)


def _ask(platform: str, flags: Mapping[str, str]) -> str:
    """"" where XLA takes them all, else what it wrote to stderr."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1",
               TPU_ACCELERATOR_TYPE="v5p-8", TPU_WORKER_HOSTNAMES="localhost",
               TF_CPP_MIN_LOG_LEVEL="0")
    for name in VARIABLES.values():
        env.pop(name, None)
    env[VARIABLES[platform]] = " ".join(f"--{name}={value}" for name, value in flags.items())
    try:
        done = subprocess.run([sys.executable, "-c", _ASK[platform]], env=env, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS} s"
    return "" if done.returncode == 0 else done.stderr or f"status {done.returncode}"
