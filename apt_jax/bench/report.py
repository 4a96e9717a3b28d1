"""What every bench writes: a JSON of versions, device and rows, kept up to date row by row.

A row belongs to the sources, the config, the compilers' flags and the other packages that made it: it
holds the revision of the first, a digest of the second, the third as they are and the fourth's
versions, and one of others is measured again. A file belongs to a device and to jax's own packages.
Its name says what, by which backend, with which overrides; its command how it came about, since
several commands fill one file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_jax.config.io import config_to_json
from apt_jax.errors import UserError
from apt_jax.installed import revision, versions_of
from apt_jax.parallel.flags import VARIABLES

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "tokamax", "flax",
            "torch", "diffusers")
# Whose rows a package makes, by a part of their names: "auto" takes tokamax where it is installed.
MAKERS = {"torch": ("torch", "diffusers"), "tokamax": ("tokamax",), "tokamax_choice": ("tokamax",),
          "auto": ("tokamax",)}


def environment(device: str) -> dict[str, Any]:
    """Versions of what decides a speed, the device's and the processor's names."""
    return {"device": device, "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2),
            "python": platform.python_version(), "versions": versions_of(PACKAGES),
            "nvidia": nvidia(), "flags": flags(), "revision": _own_revision()}


_own_revision = functools.cache(revision)  # what is edited meanwhile does not run in this process


def flags() -> str:
    """What XLA, libtpu and the C library were told: "XLA_FLAGS=--a=1 --b=2", "" for nothing."""
    return " ".join(f"{name}={' '.join(os.environ[name].split())}"
                    for name in (*VARIABLES.values(), "GLIBC_TUNABLES")
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


def config_digest(config: Any) -> str:
    """Twelve hexadecimal digits that tell configs apart: the file's fields and the overrides."""
    return hashlib.sha256(config_to_json(config).encode()).hexdigest()[:12]


def row_name(*parts: str, overrides: Sequence[str] = ()) -> str:
    """"config/forward/fp8/pallas model.depth=2": the parts, and what the command line changed."""
    changes = sorted(o.removeprefix("--").removeprefix("config.") for o in overrides)
    return " ".join(["/".join(parts), *changes])


def makers(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The packages beside jax that made a row, or whose absence left it out: its name says its
    backend; rows that PyTorch shares say its threads."""
    found = [MAKERS.get(part, ()) for part in re.split("[/ ]", name)]
    shared = ("torch",) if "torch_threads" in row else ()
    return tuple(sorted({*itertools.chain(*found), *shared}))


def deciding(device: str) -> tuple[str, ...]:
    """The packages that decide every row of a device (its kind, or a topology): jax's own."""
    own = ("jax", "jaxlib", "flax")
    if device == "cpu":
        return own
    tpu = "TPU" in device or re.match(r"v\d+[a-z]*:", device)
    return (*own, "libtpu") if tpu else (*own, "jax-cuda12-plugin", "jax-cuda13-plugin")


def _wheels(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """NVIDIA's libraries of which two machines have different versions. One that only one of them
    has (PyTorch brings some) is none, but for the assembler, the driver and what jax found; nor is a
    driver's patch (580.159.03 and 580.159.04), which machines of one kind differ by."""
    old, new = ({name: version.split(".")[0] if name == "driver" else version
                 for name, version in each.items()} for each in (old, new))
    both = set(old) & set(new)
    alone = {name for name in set(old) ^ set(new)
             if name in ("driver", "loaded") or name.startswith("nvidia-cuda-nvcc")}
    return sorted({name for name in both if old[name] != new[name]} | alone)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What made a file's rows and is another now ("driver 570, now 580"); [] where they still
    count. old, new: heads of files (`environment`), old with its rows. What an old file does not
    say is taken to be the same; times on a CPU belong to its kind and number of cores too."""
    device = str(new["device"])
    times = any("median" in row or "torch_threads" in row for row in old["rows"].values())
    keys = ("device", "cpu", "cores") if device == "cpu" and times else ("device",)
    before = {key: old.get(key, new[key]) for key in keys}
    now = {key: new[key] for key in keys}
    packages = deciding(device) if "versions" in old else ()
    before |= {name: old["versions"].get(name) for name in packages}
    now |= {name: new["versions"].get(name) for name in packages}
    libraries = (old.get("nvidia", new["nvidia"]), new["nvidia"])
    for name in _wheels(*libraries):
        before[name], now[name] = (each.get(name) for each in libraries)
    return [f"{key} {before[key] or 'none'}, now {now[key] or 'none'}" for key in now
            if before[key] != now[key]]


def read(path: Path) -> dict[str, Any]:
    """A file of rows; UserError for any other, which is not to be written over."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; name a file that can be read") from None
    except ValueError:  # no JSON, or no text
        found = None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()) or (
            any(not isinstance(found.get(key, {}), dict) for key in ("versions", "nvidia"))):
        raise UserError(f"--json {path}: no file of a bench's rows, and it stays as it is; name "
                        "another")
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of rows whole, or leaves it as it was."""
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


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
    sources, of these flags and packages and of this config (`config_digest`; "" for what uses none);
    `name in results` without a config. Files of before keep their rows, whose flags are not known.

    Where the device or what is under all rows is another (`changes`), no row counts: a line says
    why, and the first new row moves the file to NAME.before.json. Raises UserError for a file of
    anything else. keep: rows of other revisions of the sources count too.
    """

    def __init__(self, path: str | Path | None, device: str, command: Sequence[str] | None = None,
                 keep: bool = False):
        self.keep = keep
        self.path = Path(path) if path else None
        self.head = environment(device)
        self.command = shlex.join(command or ["apt-jax", *sys.argv[1:]])
        self.rows: dict[str, dict[str, Any]] = {}
        self._before: Path | None = None
        if self.path and self.path.is_file():
            old = read(self.path)
            changed = changes(old, self.head) if old["rows"] else []
            if changed:
                self._before = _beside(self.path)
                print(f"{self.path.name}: {'; '.join(changed)}: all rows are measured again, those of "
                      f"before are kept in {self._before.name}")
                return
            self.rows = old["rows"]
            versions = old.get("versions", {})
            for name, row in self.rows.items():  # of before rows said it themselves
                found = {package: versions.get(package) for package in makers(name, row)}
                if found and "packages" not in row:
                    row["packages"] = found

    def has(self, name: str, config: str = "") -> bool:
        return self._current(name, config) and not self.rows[name].get("error")

    def failed(self, name: str, config: str = "") -> bool:
        """Whether this row was tried and came to nothing."""
        return self._current(name, config) and bool(self.rows[name].get("error"))

    def _current(self, name: str, config: str) -> bool:
        row = self.rows.get(name, {})
        packages = self._packages(row.get("packages", {}))
        revision = row.get("revision") if self.keep else self.head["revision"]
        return bool(row) and (row.get("revision"), row.get("flags", ""), row.get("config", ""),
                row.get("packages", {})) == (
            revision, self.head["flags"], config, packages)

    def _packages(self, names: Iterable[str]) -> dict[str, str | None]:
        return {name: self.head["versions"].get(name) for name in names}

    def __contains__(self, name: str) -> bool:
        return self.has(name)

    def add(self, name: str, row: dict[str, Any], config: str = "") -> None:
        """Keeps a row, and writes the file at once."""
        made = {"revision": self.head["revision"], "command": self.command}
        made |= {"flags": self.head["flags"]} if self.head["flags"] else {}
        packages = self._packages(makers(name, row))
        made |= {"packages": packages} if packages else {}
        self.rows[name] = _finite({**row, **made, **({"config": config} if config else {})})
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._before:
            self.path.replace(self._before)
            self._before = None
        write(self.path, {**self.head, "rows": self.rows})


def _beside(path: Path) -> Path:
    """rows.json -> rows.before.json, or rows.before2.json and so on where that is there."""
    names = (path.with_name(f"{path.stem}.before{n or ''}{path.suffix}")
             for n in itertools.chain([0], itertools.count(2)))
    return next(name for name in names if not name.exists())


def _finite(value: Any) -> Any:
    """The value with None for each float that JSON does not know: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
