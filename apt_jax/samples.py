"""Generated samples: what they are, looking at them in a notebook, keeping them on a disk."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import logging
import math
import operator
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax import media
from apt_jax.errors import UserError, disk_errors
from apt_jax.paths import given_path


log = logging.getLogger(__name__)

RECORD = "sample.json"
MOST_SIZE = 4096  # pixels of a sample's shorter side when it is shown: beyond is a slip
SHOWN = 64  # samples that a notebook draws of itself
WEBP_SIDE = 16383  # pixels of a WebP's side at most
SHEET_PIXELS = 2**30  # of all frames of a sheet: 3 GB in memory


@dataclasses.dataclass(frozen=True, repr=False)
class Samples:
    """Generated pictures or clips. `samples[i]` is one, `samples[a:b]` some, Samples again; a
    notebook draws them as `show` does.

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

    def __getitem__(self, index: int | slice) -> Samples:
        """One sample or some, with the settings of all: noise and seed are those of the whole call.
        """
        if not isinstance(index, slice):
            i = range(len(self))[index]  # IndexError beyond them ends a loop over samples
            index = slice(i, i + 1)
        part = {name: getattr(self, name) for name in ("frames", "captions", "noise", "latents")}
        return dataclasses.replace(self, **{name: value if value is None else value[index]
                                            for name, value in part.items()})

    def __repr__(self) -> str:
        count, frames, height, width = self.frames.shape[:4]
        what = _counted(count, "picture") if frames == 1 else (
            f"{_counted(count, 'clip')} of {frames} frames")
        names = [_short(caption) for caption in dict.fromkeys(self.captions)]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"Samples({what}, {width} x {height}: {', '.join(map(repr, names[:4]))}{more})"

    def _repr_html_(self) -> str:
        if not len(self):
            return html.escape(repr(self))
        rest = len(self) - SHOWN
        return _image(self[:SHOWN]) + (f"<p>and {rest} more; apt_jax.show(samples) draws all</p>"
                                       if rest > 0 else "")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[:length - 1] + "…"


def whole(name: str, value: Any) -> int:
    """A whole number as a plain int. UserError for anything else."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{name} = {value!r:.60} is no whole number")


def number(name: str, value: Any) -> float:
    """A number as a plain float, NaN too. UserError for anything else, a string of digits too."""
    try:
        if np.ndim(value) == 0 and not isinstance(value, (bool, np.bool_, str, bytes)):
            return float(value)
    except (ArithmeticError, TypeError, ValueError):
        pass
    raise UserError(f"{name} = {value!r:.60} is no number; give one such as 0.5")


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

    _check(samples, "show", size)
    if whole("columns", columns) < 0:
        raise UserError(f"columns = {columns} must be at least 0")
    if samples.frames.shape[1] == 1:
        return Image.fromarray(_sheet(samples, size, columns))
    return Page(_image(samples, size, columns))


def _check(samples: Any, call: str, size: int) -> None:
    if not isinstance(samples, Samples):
        raise UserError(f"{call} takes what Generator.sample returned, not a "
                        f"{type(samples).__name__}; give that first")
    if not 1 <= whole("size", size) <= MOST_SIZE:
        raise UserError(f"size = {size} must be 1 to {MOST_SIZE:,} pixels")


def _sheet(samples: Samples, size: int, columns: int = 0) -> np.ndarray:
    """The samples with their captions, uint8: a picture [H, W, 3], or a clip [F, H, W, 3].

    As many of the first as one file takes; usually all.
    """
    shape = samples.frames.shape[1:4]
    fit = _fitting(len(samples), shape, size, columns)
    if fit < len(samples):
        log.warning("a sheet of %s samples would be too large; it has the first %s", len(samples), fit)
        samples = samples[:fit]
    columns = min(columns, fit)
    while size > 1 and not _fits(fit, shape, size, columns):  # one sample, enlarged too much
        size //= 2
    if samples.frames.shape[1] == 1:
        return media.grid(samples.frames[:, 0], columns, samples.captions, size)
    return media.clip_grid(samples.frames, columns, samples.captions, size)


def _fits(count: int, shape: tuple[int, int, int], size: int, columns: int) -> bool:
    frames, height, width = shape
    high, wide = media.grid_size(count, height, width, min(columns, count), True, size)
    return frames * high * wide <= SHEET_PIXELS and (frames == 1 or max(high, wide) <= WEBP_SIDE)


def _fitting(count: int, shape: tuple[int, int, int], size: int, columns: int) -> int:
    """How many of `count` samples of shape (F, H, W) fit on a sheet; at least one."""
    while count > 1 and not _fits(count, shape, size, columns):
        if not columns:  # the next smaller square
            count = (math.isqrt(count - 1)) ** 2
        elif count > columns:  # a row less
            count = (count - 1) // columns * columns
        else:
            count -= 1
    return count


def _image(samples: Samples, size: int = 128, columns: int = 0) -> str:
    """All samples as an <img> that holds its own bytes."""
    sheet = _sheet(samples, size, columns)
    kind, data = (("png", media.png_bytes(sheet)) if sheet.ndim == 3 else
                  ("webp", media.webp_bytes(sheet, samples.settings.get("fps", media.FPS))))
    name = html.escape(", ".join(map(_short, dict.fromkeys(samples.captions))), quote=True)
    return f'<img alt="{name}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def save(samples: Samples, folder: str | Path, size: int = 128) -> list[Path]:
    """Writes samples into a folder (made if needed); returns the paths.

    Images: NNN_caption.png and grid.png. Clips: NNN_caption.mp4 and .webp, and grid.webp. Grids have
    as many as one file takes, usually all. Either way sample.json with the settings and the names
    of all files, and latents.safetensors (noise, latents) where they were kept. Files are the
    samples' own size, but MP4 and grids enlarged.

    The files that an earlier sample.json in the folder names are replaced, or removed where these
    samples have none of that name; nothing else is. UserError where they cannot be written.
    """
    _check(samples, "save", size)
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
    others = len(paths)
    if samples.latents is not None:
        from safetensors.numpy import save_file

        paths.append(folder / "latents.safetensors")
        save_file({"noise": samples.noise, "latents": samples.latents}, paths[-1])
    sheet = _sheet(samples, size)
    paths.insert(others, media.save_webp(folder / "grid.webp", sheet, fps) if clips
                 else media.save_png(folder / "grid.png", sheet))
    path = folder / RECORD
    old = _named(path) - {path.name for path in paths}
    record = {**samples.settings, "seconds": samples.seconds, "samples": files,
              "others": [path.name for path in paths[others:]]}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if removed := [name for name in sorted(old) if (folder / name).is_file()]:
        for name in removed:
            (folder / name).unlink()
        log.info("%s held other samples, which these replace: %s of their files removed", folder,
                 len(removed))
    return [*paths, path]


def _named(path: Path) -> set[str]:
    """The files beside it that a sample.json names; none where it is not one of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        names = [name for sample in record["samples"] for name in sample["files"]]
        names += record.get("others", ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def _slug(text: str, length: int = 40) -> str:
    """A file name for a caption: its lower-case Latin letters, digits and underscores."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "_".join(words)[:length].rstrip("_") or ("sample" if text.strip() else "empty")
