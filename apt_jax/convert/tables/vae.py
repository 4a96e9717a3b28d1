"""The causal video VAE: diffusers' AutoencoderKLWan and AutoencoderKLQwenImage <-> models/vae.

The two classes have the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_jax.convert.configs import LAYERS, Fields, refuse
from apt_jax.convert.table import CONV2, CONV3, Rule, linear, padded, scale
from apt_jax.models.vae.config import LATENTS_MEAN, LATENTS_STD, VAEConfig

CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
GAMMA, GAMMA_IMAGE = padded(after=3), padded(after=2)  # [C, 1, 1, 1] and [C, 1, 1]


def _residual(ours: str, theirs: str, shortcut: bool) -> list[Rule]:
    rules = [*scale(f"{ours}/norm1", f"{theirs}.norm1", GAMMA, "gamma"),
             *linear(f"{ours}/conv1", f"{theirs}.conv1", layout=CONV3),
             *scale(f"{ours}/norm2", f"{theirs}.norm2", GAMMA, "gamma"),
             *linear(f"{ours}/conv2", f"{theirs}.conv2", layout=CONV3)]
    if shortcut:
        rules += linear(f"{ours}/shortcut", f"{theirs}.conv_shortcut", layout=CONV3)
    return rules


def _resample(ours: str, theirs: str, temporal: bool) -> list[Rule]:
    rules = linear(f"{ours}/conv", f"{theirs}.resample.1", layout=CONV2)
    if temporal:
        rules += linear(f"{ours}/time_conv", f"{theirs}.time_conv", layout=CONV3)
    return rules


def _ends(side: str) -> list[Rule]:
    """What encoder and decoder both have: first and last convolution, and the middle."""
    middle, theirs = f"{side}/mid", f"{side}.mid_block"
    return [
        *linear(f"{side}/conv_in", f"{side}.conv_in", layout=CONV3),
        *_residual(f"{middle}/block0", f"{theirs}.resnets.0", False),
        *scale(f"{middle}/attention/norm", f"{theirs}.attentions.0.norm", GAMMA_IMAGE, "gamma"),
        *linear(f"{middle}/attention/qkv", f"{theirs}.attentions.0.to_qkv", layout=CONV2),
        *linear(f"{middle}/attention/out", f"{theirs}.attentions.0.proj", layout=CONV2),
        *_residual(f"{middle}/block1", f"{theirs}.resnets.1", False),
        *scale(f"{side}/norm_out", f"{side}.norm_out", GAMMA, "gamma"),
        *linear(f"{side}/conv_out", f"{side}.conv_out", layout=CONV3),
    ]


def rules(vae: Mapping[str, Any]) -> list[Rule]:
    """The table. vae: the fields of VAEConfig."""
    widths = [vae["base"] * m for m in vae["multipliers"]]
    blocks, temporal, last = vae["blocks"], vae["temporal"], len(widths) - 1
    found = [*_ends("encoder"), *_ends("decoder"),
             *linear("quant", "quant_conv", layout=CONV3),
             *linear("post_quant", "post_quant_conv", layout=CONV3)]
    before = widths[0]
    for stage, width in enumerate(widths):
        # Their encoder counts blocks and halvings in one list.
        at = stage * (blocks + 1)
        for block in range(blocks):
            found += _residual(f"encoder/stage{stage}/block{block}",
                               f"encoder.down_blocks.{at + block}", block == 0 and before != width)
        if stage < last:
            found += _resample(f"encoder/stage{stage}/down", f"encoder.down_blocks.{at + blocks}",
                               temporal[stage])
        before = width
    before = widths[-1]
    for stage, width in enumerate(reversed(widths)):
        theirs = f"decoder.up_blocks.{stage}"
        for block in range(blocks + 1):
            found += _residual(f"decoder/stage{stage}/block{block}", f"{theirs}.resnets.{block}",
                               block == 0 and before != width)
        if stage < last:
            found += _resample(f"decoder/stage{stage}/up", f"{theirs}.upsamplers.0",
                               temporal[last - 1 - stage])
        before = width // 2  # their upsampling halves the channels
    return found


def config_from_theirs(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """vae/config.json -> the fields of VAEConfig, plain; UserError for what it cannot be."""
    fields = Fields(config, source, *CLASSES)
    for key, usual in (("base_dim", 96), ("num_res_blocks", 2), ("z_dim", 16),
                       ("in_channels", 3), ("input_channels", 3)):
        fields.integer(key, usual, LAYERS)
    multipliers = fields.integers("dim_mult", (1, 2, 4, 4))
    fields.value("temperal_downsample", [False, True, True], (list, tuple))
    fields.numbers("latents_mean", LATENTS_MEAN)
    if not multipliers or min(multipliers) < 1:
        raise refuse(source, f"dim_mult = {list(multipliers)} is no list of widths")
    if min(fields.numbers("latents_std", LATENTS_STD), default=0) <= 0:
        raise refuse(source, "latents_std has a number that is not above 0")
    return VAEConfig.from_diffusers(config).to_dict()
