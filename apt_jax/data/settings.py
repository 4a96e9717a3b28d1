"""What a preparation is asked to do: one frozen record, checked before any work."""

from __future__ import annotations

import dataclasses
import math
import pathlib

from apt_jax.data.presets import MULTIPLE
from apt_jax.data.quantise import TEXT_DTYPES
from apt_jax.data.records import check_size
from apt_jax.errors import UserError

TEMPORAL = 4  # frames that the VAE's time axis puts into one


@dataclasses.dataclass(frozen=True)
class Settings:
    """How files become records.

    sizes: (height, width) of the buckets; a file goes to the nearest aspect. frames: clip lengths;
    a file goes to the longest that it fills, 1 is an image. sampling: "even" spreads the frames
    over the whole clip, "consecutive" takes them from the middle at `fps` (0: the file's own rate).
    holdout: part of the groups kept from training. quality: of WebP. background: RGB under
    transparency. max_tokens: of a caption. shard_records: files of one shard.

    For latents, besides: image_sizes: of single frames (none: `sizes`). clips: most windows cut
    from one file, 0 is all that fit. min_fps: slower videos are left out (their frames would be
    repeated). max_enlarge: files are left out that would have to grow by more (0: any factor).
    text_dtype: how text states are stored. encode_batch: samples of one VAE call on each device.
    """

    name: str = "data"
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    frames: tuple[int, ...] = (1,)
    sampling: str = "consecutive"
    fps: float = 0.0
    holdout: float = 0.05
    quality: int = 90
    background: tuple[int, int, int] = (255, 255, 255)
    max_tokens: int = 64
    shard_records: int = 512
    negative_prompt: str | None = None
    notices: tuple[str, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    clips: int = 1
    min_fps: float = 0.0
    max_enlarge: float = 0.0
    text_dtype: str = "int8"
    encode_batch: int = 1

    def check(self, latents: bool = False) -> None:
        """UserError for a value that makes no sense."""
        tokens = 4096 if latents else 512
        ranges = {
            "sizes": (bool(self.sizes) and all(min(s) > 0 for s in self.sizes),
                      "one size or more, of sides from 1"),
            "frames": (bool(self.frames) and min(self.frames) > 0,
                       "one length or more, each from 1 (an image)"),
            "sampling": (self.sampling in ("even", "consecutive"), "even or consecutive"),
            "fps": (0 <= self.fps < math.inf, "0 (the file's own rate) or more"),
            "holdout": (0 <= self.holdout < 1, "from 0 to less than 1"),
            "quality": (1 <= self.quality <= 100, "from 1 to 100"),
            "max_tokens": (2 <= self.max_tokens <= tokens, f"from 2 to {tokens}"),
            "shard_records": (self.shard_records > 0, "1 or more"),
            "clips": (self.clips >= 0, "0 (all) or more"),
            "min_fps": (0 <= self.min_fps < math.inf, "0 or more"),
            "max_enlarge": (self.max_enlarge == 0 or 1 <= self.max_enlarge < math.inf,
                            "0 (any) or from 1"),
            "text_dtype": (self.text_dtype in TEXT_DTYPES, " or ".join(TEXT_DTYPES)),
            "encode_batch": (self.encode_batch > 0, "1 or more"),
        }
        for key, (fine, allowed) in ranges.items():
            if not fine:
                value = getattr(self, key)
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UserError(f"prepare: {key} = {shown} is not allowed; give {allowed}")
        names = [pathlib.Path(notice).name for notice in self.notices]
        if len(set(names)) < len(names) or set(names) & {"manifest.json", "skipped.jsonl",
                                                         "report.json"}:
            raise UserError(f"prepare: notices named {', '.join(names)} would lie on each other or "
                            "on files of the data set; rename them")
        for notice in self.notices:
            if not pathlib.Path(notice).is_file():
                raise UserError(f"prepare: no file {notice}; give the path of a licence text")
        self._check_latents() if latents else self._check_pixels()

    def _check_pixels(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in LATENT_ONLY and getattr(self, field.name) != field.default:
                raise UserError(f"prepare: {field.name} belongs to latents; give --vae and "
                                "--text-encoder, or leave it out")
        if self.sampling == "even" and self.fps:
            raise UserError(f"prepare: fps = {self.fps:g} has no meaning with sampling = even, which "
                            "spreads the frames over all of a clip; leave one of them out")
        for count in self.frames:
            for height, width in self.sizes:
                check_size(count, height, width)

    def _check_latents(self) -> None:
        for count in self.frames:
            if (count - 1) % TEMPORAL:
                low = count - (count - 1) % TEMPORAL
                raise UserError(f"prepare: {count} frames do not fit the VAE, which takes 1 + 4 k; "
                                f"choose {low} or {low + TEMPORAL}")
        for height, width in self.sizes + self.image_sizes:
            if height % MULTIPLE or width % MULTIPLE:
                near = " x ".join(str(max(1, round(n / MULTIPLE)) * MULTIPLE)
                                  for n in (width, height))
                raise UserError(f"prepare: size {width}x{height} is no multiple of {MULTIPLE} "
                                f"(VAE 8, patch 2); the nearest is {near}")

    def made(self, latents: bool) -> dict:
        """The settings as they are recorded: those for latents only where latents are made."""
        value = dataclasses.asdict(self)
        return {k: v for k, v in value.items() if latents or k not in LATENT_ONLY}


LATENT_ONLY = ("image_sizes", "clips", "min_fps", "max_enlarge", "text_dtype", "encode_batch")
