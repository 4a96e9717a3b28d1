"""diffusers' names of the VAE's weights -> our parameter tree, for tests alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from apt_jax.weights import unflatten


def our_name(name: str, blocks: int) -> str:
    """"decoder.up_blocks.0.resnets.1.norm1.gamma" -> "decoder/stage0/block1/norm1/scale".

    blocks: residual blocks of each resolution in the encoder, whose diffusers list is flat.
    """
    def down(match: re.Match) -> str:
        stage, place = divmod(int(match[1]), blocks + 1)
        return f"stage{stage}." + ("down" if place == blocks else f"block{place}")

    for pattern, new in (
        (r"down_blocks\.(\d+)", down),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"stage\1.block\2"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", r"stage\1.up"),
        (r"mid_block\.resnets\.(\d+)", r"mid.block\1"),
        (r"mid_block\.attentions\.0", "mid.attention"),
        (r"resample\.1", "conv"),
        (r"conv_shortcut", "shortcut"),
        (r"to_qkv", "qkv"),
        (r"\.proj\.", ".out."),
        (r"quant_conv", "quant"),
        (r"gamma$", "scale"),
        (r"weight$", "kernel"),
    ):
        name = re.sub(pattern, new, name)
    return name.replace(".", "/")


def from_reference(weights: Mapping[str, np.ndarray], blocks: int = 2) -> dict:
    """A reference state dict (numpy) -> our nested params."""
    flat = {}
    for name, value in weights.items():
        if name.endswith("gamma"):
            value = value.reshape(-1)
        elif value.ndim > 1:  # [out, in, *window] -> [*window, in, out]
            value = np.moveaxis(value, (0, 1), (-1, -2))
        flat[our_name(name, blocks)] = np.ascontiguousarray(value)
    return unflatten(flat)
