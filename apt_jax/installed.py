"""What made a result: versions of installed packages and the revision of the sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """{name: version} of those that are installed, in the order given."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def notice() -> str:
    """The text of our NOTICE, of the checkout or of the installed package; "" where neither has it."""
    places = [Path(__file__).parents[1] / "NOTICE"]
    with suppress(importlib.metadata.PackageNotFoundError):
        places += [Path(str(file.locate())) for file in importlib.metadata.files("apt_jax") or ()
                   if file.name == "NOTICE"]
    for place in places:
        with suppress(OSError):
            if (text := place.read_text(encoding="utf-8")).startswith("apt_jax\n"):
                return text
    return ""


def revision(*beside: Path) -> str:
    """What the package's code is, and that of the folders `beside` it: the last git commit of these,
    whatever else the checkout holds (results that are just being written, for one); a digest of the
    sources where they differ from it or where there is no git."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for folder in (package, *beside) for path in folder.rglob("*.py")):
        digest.update(os.path.relpath(path, package).encode() + path.read_bytes())
    sources = f"sources-{digest.hexdigest()[:10]}"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments, "--", ".", *map(str, beside)], cwd=package,
                              capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "?"

    try:
        commit, changed = git("log", "-1", "--format=%h"), git("status", "-s")
    except OSError:  # git is not installed
        return sources
    return sources if not commit or commit == "?" or changed else commit
