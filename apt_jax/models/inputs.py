"""What every velocity network asks of its inputs."""

from __future__ import annotations

from typing import Any

import chex
import jax


def check_inputs(c: Any, x: jax.Array, t: jax.Array, text: jax.Array, text_mask: jax.Array) -> None:
    """AssertionError unless x is [B, F, H, W, in_channels], t [B], text [B, L, text_width] and
    text_mask bool [B, L]. c: the network's config."""
    chex.assert_rank([x, t, text, text_mask], [5, 1, 3, 2])
    chex.assert_equal_shape_prefix([x, t, text, text_mask], 1)
    chex.assert_equal_shape_prefix([text, text_mask], 2)
    chex.assert_axis_dimension(x, 4, c.in_channels)
    chex.assert_axis_dimension(text, 2, c.text_width)
    chex.assert_type(text_mask, bool)
