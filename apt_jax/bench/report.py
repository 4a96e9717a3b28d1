"""What every bench writes: a JSON of versions, device and rows, kept up to date row by row."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "tokamax", "flax",
            "torch", "diffusers")


def environment(device: str) -> dict[str, Any]:
    """Versions of what decides a speed, the device's name, and the command."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": device, "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2), "python": platform.python_version(),
            "versions": versions, "command": ["apt-jax", *sys.argv[1:]]}


class Results:
    """Rows by name in a JSON file. A bench that was stopped goes on with the rows that are missing."""

    def __init__(self, path: str | Path | None, device: str):
        self.path = Path(path) if path else None
        self.head = environment(device)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path and self.path.is_file():
            old = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(old.get(key) == self.head[key] for key in ("device", "versions"))
            self.rows = old["rows"] if same else {}  # other hardware or versions: start again

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keeps a row, and writes the file at once."""
        self.rows[name] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.tmp")
        part.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n",
                        encoding="utf-8")
        part.replace(self.path)
