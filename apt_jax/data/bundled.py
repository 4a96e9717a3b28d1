"""Where the bundled data set lies, and the paths that users give."""

from __future__ import annotations

import pathlib

from apt_jax.errors import UserError

PACKS = {"emoji": pathlib.Path(__file__).parent / "emoji"}


def resolve(path: str | pathlib.Path) -> pathlib.Path:
    """'bundled:emoji' -> its folder in the package; any other path -> itself."""
    text = str(path)
    if not text.startswith("bundled:"):
        return pathlib.Path(text).expanduser()
    name = text.removeprefix("bundled:")
    if name not in PACKS:
        raise UserError(f"no bundled data set {name!r}; there is: {', '.join(sorted(PACKS))}")
    return PACKS[name]
