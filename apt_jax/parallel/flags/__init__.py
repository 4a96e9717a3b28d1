"""XLA flags per platform: gpu.txt and tpu.txt, each flag with its reason.

    export XLA_FLAGS="$(python -m apt_jax.parallel.flags gpu --hosts 8)"

gpu_hosts.txt has those that runs on many hosts take beside gpu.txt.

The launch scripts export them and `apt-jax plan` compiles with them, so that what was planned is what
runs. Flags come and go between XLA versions, and an unknown one in XLA_FLAGS aborts the process;
`check.unknown_flags` asks the installed one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any

from apt_jax.errors import UserError

# What XLA and libtpu read their flags from.
VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
PLATFORMS = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}
MANY_HOSTS = 4  # from here on gpu_hosts.txt is added
_LINE = re.compile(r"--(xla_\w+)=(\S+)\s+# \S.*")


def parse_flags(text: str, where: str) -> dict[str, str]:
    """{"xla_...": "value"} of a flags file. UserError for a line without flag, value and reason."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(f"{where}, line {number}: write '--xla_name=value  # the reason'")
        if match.group(1) in found:
            raise UserError(f"{where}, line {number}: {match.group(1)} is set twice")
        found[match.group(1)] = match.group(2)
    return found


def platform_flags(platform: str, hosts: int = 1) -> dict[str, str]:
    """The flags of "gpu" ("cuda") or "tpu" for a run on so many hosts (of TPUs: any number)."""
    if platform not in PLATFORMS:
        raise UserError(f"there are no flags for {platform!r}; use gpu or tpu")
    if hosts < 1:
        raise UserError(f"a run on {hosts} hosts; give 1 or more")
    many = PLATFORMS[platform] == "gpu" and hosts >= MANY_HOSTS
    found: dict[str, str] = {}
    for name in [f"{PLATFORMS[platform]}.txt", *(["gpu_hosts.txt"] if many else [])]:
        found |= parse_flags((resources.files(__name__) / name).read_text(encoding="utf-8"), name)
    return found


def compiler_options(source: str, platform: str, hosts: int = 1) -> dict[str, Any]:
    """XLA compiler options from a flags file, "auto" (the platform's own for so many hosts) or
    "none"."""
    if source == "none":
        return {}
    if source == "auto":
        flags = platform_flags(platform, hosts)
    else:
        try:
            flags = parse_flags(Path(source).read_text(encoding="utf-8"), source)
        except OSError as error:
            raise UserError(f"cannot read the flags {source} ({error.strerror}); give a file, "
                            "'auto' or 'none'") from None
    return {name: _value(value) for name, value in flags.items()}


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def environment_value(platform: str, hosts: int = 1, without: Collection[str] = ()) -> str:
    """What to put into XLA_FLAGS (gpu) or LIBTPU_INIT_ARGS (tpu) of a run on so many hosts."""
    return " ".join(f"--{name}={value}" for name, value in platform_flags(platform, hosts).items()
                    if name not in without)
