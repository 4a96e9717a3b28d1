"""What every bench writes: a JSON of versions, device and rows, kept up to date row by row.

A row belongs to the sources, the config and the compilers' flags that made it: it holds the revision
of the first, a digest of the second and the third as they are, and one of others is measured again.
Its name says what, by which backend, with which overrides; its command how it came about, since
several commands fill one file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apt_jax.config.io import config_to_json
from apt_jax.errors import UserError
from apt_jax.installed import versions_of

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "tokamax", "flax",
            "torch", "diffusers")


# What compilers read beside the program.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def environment(device: str) -> dict[str, Any]:
    """Versions of what decides a speed, the device's and the processor's names."""
    return {"device": device, "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2),
            "python": platform.python_version(), "versions": versions_of(PACKAGES),
            "nvidia": nvidia(), "flags": flags(), "revision": revision()}


def flags() -> str:
    """The flags of XLA and libtpu in force: "XLA_FLAGS=--a=1 --b=2", "" without any."""
    return " ".join(f"{name}={' '.join(os.environ[name].split())}" for name in FLAGS
                    if os.environ.get(name, "").split())


def nvidia() -> dict[str, str]:
    """{wheel: version} of NVIDIA's libraries (cuDNN, cuBLAS, the CUDA runtime), the driver's
    version as "driver", and as "loaded" which cuDNN, cuBLAS and runtime jax itself found, which are
    the machine's own where there are no wheels. {} of what is not there."""
    names = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
    found = versions_of(sorted(name for name in names if name.startswith("nvidia-")))
    return found | _driver() | _loaded()


def _driver() -> dict[str, str]:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.split() if done.returncode == 0 else []
    return {"driver": lines[0]} if lines else {}


def _loaded() -> dict[str, str]:
    """What jax says of the libraries in its process; it does so where no public name is for it."""
    try:
        from jax._src.lib import cuda_versions as said

        return {"loaded": ", ".join(f"{name} {getattr(said, f'{name}_get_version')()}" for name in
                                    ("cudnn", "cublas", "cuda_runtime"))} if said else {}
    except Exception:  # no GPU's libraries, or a jax that keeps this elsewhere
        return {}


def processor(table: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as its maker has it; the kind of machine where that is not known."""
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines)
             if key.strip() == "model name"]
    return next(filter(None, names), platform.processor() or platform.machine())


@functools.cache
def revision() -> str:
    """What the package's code is: the git commit, a digest of the sources where they differ from it
    or where there is no git."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    sources = f"sources-{digest.hexdigest()[:10]}"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "?"

    try:
        commit, changed = git("log", "-1", "--format=%h", "--", "."), git("status", "-s", "--", ".")
    except OSError:  # git is not installed
        return sources
    return sources if not commit or commit == "?" or changed else commit


def config_digest(config: Any) -> str:
    """Twelve hexadecimal digits that tell configs apart: the file's fields and the overrides."""
    return hashlib.sha256(config_to_json(config).encode()).hexdigest()[:12]


def row_name(*parts: str, overrides: Sequence[str] = ()) -> str:
    """"config/forward/fp8/pallas model.depth=2": the parts, and what the command line changed."""
    changes = sorted(o.removeprefix("--").removeprefix("config.") for o in overrides)
    return " ".join(["/".join(parts), *changes])


def attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """make()'s row; one with "skipped" where a kernel or package refuses in words; one with
    "error", the traceback printed, where anything else is raised: that is made again next time."""
    try:
        return make()
    except UserError as error:
        return {"skipped": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": in_a_line(error)}


def in_a_line(error: BaseException, letters: int = 300) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:letters]}"


class Results:
    """Rows by name in a JSON file. A bench that was stopped goes on with the rows that are missing.

    `results.has(name, config)` where the row is there, without an error, of this revision of the
    sources, of these flags and of this config (`config_digest`; "" for what uses none); `name in
    results` without a config. Files of before keep their rows, whose flags are not known.
    """

    def __init__(self, path: str | Path | None, device: str, command: Sequence[str] | None = None):
        self.path = Path(path) if path else None
        self.head = environment(device)
        self.command = shlex.join(command or ["apt-jax", *sys.argv[1:]])
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path and self.path.is_file():
            old = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(old.get(key, self.head[key]) == self.head[key]
                       for key in ("device", "versions", "nvidia"))
            self.rows = old["rows"] if same else {}  # other hardware or versions: start again

    def has(self, name: str, config: str = "") -> bool:
        return self._current(name, config) and not self.rows[name].get("error")

    def failed(self, name: str, config: str = "") -> bool:
        """Whether this row was tried and came to nothing."""
        return self._current(name, config) and bool(self.rows[name].get("error"))

    def _current(self, name: str, config: str) -> bool:
        row = self.rows.get(name, {})
        return (row.get("revision"), row.get("flags", ""), row.get("config", "")) == (
            self.head["revision"], self.head["flags"], config)

    def __contains__(self, name: str) -> bool:
        return self.has(name)

    def add(self, name: str, row: dict[str, Any], config: str = "") -> None:
        """Keeps a row, and writes the file at once."""
        made = {"revision": self.head["revision"], "command": self.command}
        made |= {"flags": self.head["flags"]} if self.head["flags"] else {}
        self.rows[name] = _finite({**row, **made, **({"config": config} if config else {})})
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.tmp")
        content = {**self.head, "rows": self.rows}
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(self.path)


def _finite(value: Any) -> Any:
    """The value with None for each float that JSON does not know: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
