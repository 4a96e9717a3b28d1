"""Generated samples: what they are, looking at them in a notebook, keeping them on a disk."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import operator
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax import media
from apt_jax.errors import UserError, disk_errors
from apt_jax.paths import given_path


@dataclasses.dataclass(frozen=True)
class Samples:
    """Generated pictures or clips.

    Attributes:
      frames: uint8 [N, F, H, W, 3]; F is 1 for images.
      captions: N prompts, one a sample.
      settings: how they were made: mode, steps, guidance, seed, ..., as plain JSON values.
      seconds: median time after compilation to draw `settings["batch"]` samples and bring them to
        the host, or None if it was not measured.
      noise, latents: what the sampler began with and what it gave, before the VAE or the rounding
        to bytes: float32 [N, F', H', W', C], where they were asked for.
    """

    frames: np.ndarray
    captions: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float | None = None
    noise: np.ndarray | None = None
    latents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.frames)


def whole(name: str, value: Any) -> int:
    """A whole number as a plain int. UserError for anything else."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{name} = {value!r} is no whole number")


def texts(prompts: Any) -> list[Any]:
    """Prompts as a list; a string is one, not its letters. UserError for none, and for no list."""
    try:
        found = [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError:
        raise UserError(f"prompts = {prompts!r:.60} is no text; give a string, or several in a "
                        "list") from None
    if not found:
        raise UserError("there is no prompt; give at least one")
    return found


class Page:
    """HTML that a notebook displays; `.html` is the text."""

    def __init__(self, text: str):
        self.html = text

    def _repr_html_(self) -> str:
        return self.html


def show(samples: Samples, size: int = 128, columns: int = 0) -> Any:
    """For a notebook's last line: a PIL picture (images) or HTML with a looping clip (clips).

    size: pixels of a sample's shorter side, enlarged by a whole factor. columns: 0 is about square.
    """
    from PIL import Image

    if whole("columns", columns) < 0:
        raise UserError(f"columns = {columns} must be at least 0")

    if samples.frames.shape[1] == 1:
        sheet = media.grid(samples.frames[:, 0], columns, samples.captions, size)
        return Image.fromarray(sheet)
    sheet = media.webp_bytes(media.clip_grid(samples.frames, columns, samples.captions, size),
                             samples.settings.get("fps", media.FPS))
    name = html.escape(", ".join(dict.fromkeys(samples.captions)), quote=True)
    data = base64.b64encode(sheet).decode()
    return Page(f'<img alt="{name}" src="data:image/webp;base64,{data}">')


def save(samples: Samples, folder: str | Path, size: int = 128) -> list[Path]:
    """Writes samples into a folder (made if needed); returns the paths.

    Images: NNN_caption.png and grid.png. Clips: NNN_caption.mp4 and .webp, and grid.webp. Either
    way sample.json with the settings, and latents.safetensors (noise, latents) where they were
    kept. Files are the samples' own size, but MP4 and grids enlarged. UserError where they cannot be
    written.
    """
    folder = writable(folder)
    with disk_errors(folder):
        return _save(samples, folder, size)


def writable(folder: str | Path) -> Path:
    """The folder, made if needed; UserError unless files can be written into it."""
    if not str(folder):
        raise UserError("the output folder has no name; give one")
    folder = Path(given_path("folder", folder))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def _save(samples: Samples, folder: Path, size: int) -> list[Path]:
    clips, fps = samples.frames.shape[1] > 1, samples.settings.get("fps", media.FPS)
    paths, files = [], []
    for i, (frames, caption) in enumerate(zip(samples.frames, samples.captions)):
        stem = f"{i:03d}_{_slug(caption)}"
        if clips:
            new = [media.save_mp4(folder / f"{stem}.mp4", frames, fps),
                   media.save_webp(folder / f"{stem}.webp", frames, fps)]
        else:
            new = [media.save_png(folder / f"{stem}.png", frames[0])]
        paths += new
        files.append({"caption": caption, "files": [path.name for path in new]})
    if clips:
        sheet = media.clip_grid(samples.frames, labels=samples.captions, size=size)
        paths.append(media.save_webp(folder / "grid.webp", sheet, fps))
    else:
        sheet = media.grid(samples.frames[:, 0], labels=samples.captions, size=size)
        paths.append(media.save_png(folder / "grid.png", sheet))
    if samples.latents is not None:
        from safetensors.numpy import save_file

        paths.append(folder / "latents.safetensors")
        save_file({"noise": samples.noise, "latents": samples.latents}, paths[-1])
    record = {**samples.settings, "seconds": samples.seconds, "samples": files}
    path = folder / "sample.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return [*paths, path]


def _slug(text: str, length: int = 40) -> str:
    """A file name for a caption: lower-case letters, digits and underscores."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "_".join(words)[:length].rstrip("_") or "empty"
