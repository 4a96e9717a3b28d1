"""What every bench writes: a JSON of versions, device and rows, kept up to date row by row.

A row belongs to the sources that made it: it holds their revision, and one of another revision is
measured again. Its name says everything else: what, by which backend, with which overrides.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apt_jax.installed import versions_of

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "tokamax", "flax",
            "torch", "diffusers")


def environment(device: str) -> dict[str, Any]:
    """Versions of what decides a speed, the device's name, and the command."""
    return {"device": device, "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2),
            "python": platform.python_version(), "versions": versions_of(PACKAGES),
            "revision": revision(),
            "command": ["apt-jax", *sys.argv[1:]]}


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


def row_name(*parts: str, overrides: Sequence[str] = ()) -> str:
    """"config/forward/fp8/pallas model.depth=2": the parts, and what the command line changed."""
    changes = sorted(o.removeprefix("--").removeprefix("config.") for o in overrides)
    return " ".join(["/".join(parts), *changes])


class Results:
    """Rows by name in a JSON file. A bench that was stopped goes on with the rows that are missing.

    `name in results` where the row is there and of this revision of the sources.
    """

    def __init__(self, path: str | Path | None, device: str):
        self.path = Path(path) if path else None
        self.head = environment(device)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path and self.path.is_file():
            old = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(old.get(key) == self.head[key] for key in ("device", "versions"))
            self.rows = old["rows"] if same else {}  # other hardware or versions: start again

    def __contains__(self, name: str) -> bool:
        return self.rows.get(name, {}).get("revision") == self.head["revision"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keeps a row, and writes the file at once."""
        self.rows[name] = {**row, "revision": self.head["revision"]}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.tmp")
        part.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n",
                        encoding="utf-8")
        part.replace(self.path)
