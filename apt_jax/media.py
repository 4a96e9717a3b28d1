"""Pictures and clips in and out: PNG, labelled grids, contact sheets, MP4, animated WebP.

Frames are uint8 RGB [H, W, 3]; a clip is [F, H, W, 3]; a set of clips [N, F, H, W, 3]. Tiny frames
are enlarged by whole factors with nearest neighbour, so that what is seen is what was made.
"""

import functools
import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apt_jax.errors import UserError

INK, PAPER = (40, 40, 40), (255, 255, 255)
FPS, LATENT_FPS = 8.0, 16.0  # of clips whose settings say nothing: pixels, and Wan's latents


def frame_rate(asked: float, latents: bool) -> float:
    """Frames a second of a clip as it is written.

    asked: config.sample.fps, 0 where it is not said; latents: a VAE makes the frames.
    """
    return float(asked) or (LATENT_FPS if latents else FPS)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1], any shape -> uint8: round((x + 1) * 127.5), clipped to 0..255.

    Inverse of `from_uint8` for every byte. Raises UserError for NaN, which no byte stands for.
    """
    x = np.asarray(x, np.float32)
    if np.isnan(x).any():
        raise UserError("samples contain NaN; the network or its weights are broken")
    return np.clip(np.rint((x + 1.0) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(x: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return np.asarray(x, np.float32) / 127.5 - 1.0


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Nearest-neighbour enlargement of [..., H, W, C] by a whole factor."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def factor_for(frames: np.ndarray, size: int) -> int:
    """The whole factor that brings the shorter side of [..., H, W, C] to about `size` pixels."""
    return max(1, round(size / min(frames.shape[-3:-1])))


# ---------------------------------------------------------------- files


def png_bytes(image: np.ndarray) -> bytes:
    """One RGB picture uint8 [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(_checked(image, 3)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def webp_bytes(clip: np.ndarray, fps: float = 8.0, quality: int = 0) -> bytes:
    """A clip uint8 [F, H, W, 3] as an endlessly looping animated WebP.

    quality: 0 is lossless; 1 to 100 is lossy and, at 64 px, a fifth of the size.
    """
    first, *rest = [Image.fromarray(frame) for frame in _checked(clip, 4)]
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps),
               loop=0, lossless=not quality, quality=quality or 80, method=4)
    return buffer.getvalue()


def save_png(path: Path | str, image: np.ndarray) -> Path:
    """Write uint8 [H, W, 3] as PNG."""
    return _write(path, png_bytes(image))


def save_webp(path: Path | str, clip: np.ndarray, fps: float = 8.0) -> Path:
    """Write uint8 [F, H, W, 3] as an animated WebP."""
    return _write(path, webp_bytes(clip, fps))


def save_mp4(path: Path | str, clip: np.ndarray, fps: float = 8.0, size: int = 256) -> Path:
    """Write uint8 [F, H, W, 3] as MP4 (H.264, or MPEG-4 where this FFmpeg has no libx264).

    Frames whose shorter side is below `size` pixels are enlarged by a whole factor; odd sides lose
    nothing, their last row or column is doubled (yuv420p needs even sides).
    """
    import av

    clip = enlarge(_checked(clip, 4), factor_for(clip, size))
    height, width = clip.shape[1:3]
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "16", "preset": "medium"} if codec == "libx264" else {"qscale": "2"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000),
                                      options=options)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return _write(path, buffer.getvalue())


# ---------------------------------------------------------------- layouts


def grid_size(count: int, height: int, width: int, columns: int = 0, labels: bool = False,
              size: int = 0, gap: int = 4) -> tuple[int, int]:
    """(height, width) in pixels of the `grid` of so many pictures of height x width."""
    factor = max(1, round(size / min(height, width)))
    columns = columns or int(np.ceil(np.sqrt(count)))
    strip = 16 if labels else 0
    return (-(-count // columns) * (height * factor + gap + strip) + gap,
            columns * (width * factor + gap) + gap)


def grid(images: np.ndarray, columns: int = 0, labels: Sequence[str] | None = None,
         size: int = 0, gap: int = 4) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] as one uint8 picture, row by row, each label under its picture.

    columns: 0 = about square. size: enlarge so that a side has about this many pixels (0 = as is).
    """
    images = _checked(images, 4)
    if size:
        images = enlarge(images, factor_for(images, size))
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    strip = 16 if labels is not None else 0
    sheet = Image.new("RGB", grid_size(n, height, width, columns, labels is not None, gap=gap)[::-1],
                      PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x = gap + i % columns * (width + gap)
        y = gap + i // columns * (height + gap + strip)
        sheet.paste(Image.fromarray(image), (x, y))
        if labels is not None:
            draw.text((x, y + height + 1), _fitted(labels[i], width), fill=INK, font=_font())
    return np.asarray(sheet)


def clip_grid(clips: np.ndarray, columns: int = 0, labels: Sequence[str] | None = None,
              size: int = 0) -> np.ndarray:
    """Clips uint8 [N, F, H, W, 3] as one clip of grids uint8 [F, H', W', 3]."""
    frames = _checked(clips, 5).swapaxes(0, 1)
    if labels is not None:  # cut once, not for every frame
        width = frames.shape[3] * (factor_for(frames, size) if size else 1)
        labels = [_fitted(text, width) for text in labels]
    return np.stack([grid(frame, columns, labels, size) for frame in frames])


def contact_sheet(clips: np.ndarray, labels: Sequence[str] | None = None,
                  size: int = 0) -> np.ndarray:
    """Clips uint8 [N, F, H, W, 3] as one picture: a row per clip, a column per frame."""
    n, frames = _checked(clips, 5).shape[:2]
    if labels is not None:  # the caption stands under the first frame of its row
        labels = [text if f == 0 else "" for text in labels for f in range(frames)]
    return grid(clips.reshape(n * frames, *clips.shape[2:]), frames, labels, size)


@functools.cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(11)


def _fitted(text: str, width: int) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text, font = " ".join(text.split()), _font()
    most = 4 * width  # letters that are looked at: hardly one is narrower than a pixel
    if len(text) <= most and font.getlength(text) <= width:
        return text
    fits, too_long = 0, min(len(text), most) + 1  # letters beside the ellipsis
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(text[:middle] + "…") <= width:
            fits = middle
        else:
            too_long = middle
    return text[:fits].rstrip() + "…" if fits else ""


def _checked(frames: np.ndarray, ndim: int) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != ndim or frames.shape[-1] != 3 or not frames.size:
        raise UserError(
            f"expected uint8 RGB frames with {ndim} axes, got {frames.dtype} {frames.shape}; "
            "convert with apt_jax.media.to_uint8")
    return frames


def _write(path: Path | str, data: bytes) -> Path:
    """Write whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    os.replace(partial, path)
    return path
