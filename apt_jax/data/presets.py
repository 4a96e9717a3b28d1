"""Named lists of bucket sizes for the VAE: every side a multiple of 16 (VAE 8x, patch 2)."""

from __future__ import annotations

from apt_jax.data.buckets import parse_size
from apt_jax.errors import UserError

MULTIPLE = 16

# (height, width) by name. Each list covers wide, square and tall at about one area, so that all
# buckets of a list cost alike: 0.40, 0.92 and 1.05 million pixels.
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "480p": ((480, 832), (544, 704), (624, 624), (704, 544), (832, 480)),
    "720p": ((720, 1280), (832, 1088), (960, 960), (1088, 832), (1280, 720)),
    "1024px": (
        (640, 1536), (768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896),
        (1216, 832), (1344, 768), (1536, 640),
    ),
}


def parse_sizes(texts) -> tuple[tuple[int, int], ...]:
    """('480p', '96x64') -> all their (height, width), each once. UserError for a wrong one."""
    found: dict[tuple[int, int], None] = {}
    for text in texts:
        if text in SIZES:
            found.update(dict.fromkeys(SIZES[text]))
            continue
        try:
            found[parse_size(text)] = None
        except UserError as error:
            raise UserError(f"{error}, or one of: {', '.join(SIZES)}") from None
    return tuple(found)
