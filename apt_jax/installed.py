"""Versions of installed packages, for the records that results carry."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """{name: version} of those that are installed, in the order given."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
