"""The report's pictures: inline, and enlarged without smoothing."""

import base64
import html

import numpy as np

from apt_jax import media

FPS = 6.0
CELL = 128  # displayed pixels of a frame's shorter side


def image(clip: np.ndarray, alt: str, size: int = CELL, style: str = "frame") -> str:
    """<img> of uint8 [F, H, W, 3]: a PNG, or an animated WebP where it moves.

    size: displayed pixels of the shorter side. style: its CSS class.
    """
    height, width = clip.shape[1:3]
    scale = size / min(height, width)
    if len(clip) > 1:
        # Small frames show every pixel; larger ones need not, and a page should stay a few MB.
        quality = 0 if min(height, width) < 48 else 88
        kind, data = "webp", media.webp_bytes(clip, FPS, quality)
    else:
        kind, data = "png", media.png_bytes(clip[0])
    return (f'<img class="{style}" width="{round(width * scale)}" height="{round(height * scale)}" '
            f'alt="{html.escape(alt, quote=True)}" '
            f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">')


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below total, evenly apart, the first and the last among them."""
    return [int(i) for i in np.unique(np.linspace(0, total - 1, min(count, total)).round())]
