"""Where a checkpoint comes from: a local diffusers folder, or an id on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from apt_jax.errors import UserError
from apt_jax.tensor_files import open_folder, read_header, read_table

INDEX = "model_index.json"
CONFIG = "config.json"
# how diffusers and transformers name the weight files of the networks that a pipeline must have
_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
          "text_encoder": "model"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BLOCK = 2**22


class Source(NamedTuple):
    """A diffusers folder on disk, and where it came from as JSON values."""

    folder: Path
    origin: dict[str, Any]


def locate(source: str, revision: str | None = None) -> Source:
    """A local folder, or the hub's snapshot of an id (downloaded, or from its cache).

    UserError when it is neither, the hub cannot be reached, or huggingface_hub is not installed.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision:
            raise UserError(f"--revision {revision} is of a hub id, and {source} is a folder here; "
                            "leave it out")
        return Source(folder, {"folder": str(source), "revision": None})
    if not _HUB_ID.fullmatch(source) or source.startswith((".", "/")):
        raise UserError(f"there is no folder {source}; give a diffusers folder or a hub id like "
                        "org/name")
    return _download(source, revision)


def _download(name: str, revision: str | None) -> Source:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{name} is no folder here, and the hub needs huggingface_hub; pip install "
                        "huggingface_hub, or give a local folder") from None
    try:
        folder = Path(huggingface_hub.snapshot_download(
            name, revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md",
                            "LICENSE*"]))
    except Exception as error:  # a dozen kinds, from requests, the hub and the disk
        raise UserError(f"there is no folder {name}, and the hub did not give it "
                        f"({type(error).__name__}); go online, or give a local folder") from None
    return Source(folder, {"hub": name, "revision": folder.name})


def files_of(folder: Path, skip: Iterable[str] = ()) -> list[Path]:
    """Relative paths of the files below `folder`, hidden ones and folders in `skip` left out."""
    skip = set(skip)
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or relative.parts[0] in skip:
            continue
        if path.is_file():
            found.append(relative)
    return found


def check_weights(folder: Path, names: Iterable[str]) -> None:
    """Checks config.json and weights of a pipeline's networks, also of those not converted.

    Args:
      folder: of the pipeline; names: its components, folders in it.

    Raises:
      UserError: a network without config or weights, a file that is cut or missing, an index that
      disagrees with its files. Variants such as fp16 are checked like the rest.
    """
    for name in names:
        if name in _STEMS:
            read_table(folder / name / CONFIG)
            open_folder(folder / name, _STEMS[name])
        for file in files_of(folder / name):
            if file.suffix == ".safetensors":
                read_header(folder / name / file)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def licence_of(folder: Path) -> str:
    """The licence that the folder's README.md states in its front matter; "unknown" without."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", front.group(1), re.MULTILINE) if front else None
    return line.group(1).strip("'\"") if line else "unknown"
