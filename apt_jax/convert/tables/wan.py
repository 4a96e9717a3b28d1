"""Wan 2.1's text-to-video transformer: diffusers' WanTransformer3DModel <-> models/wan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from apt_jax.convert.configs import LAYERS, Fields, refuse
from apt_jax.convert.table import Rule, channel_last_patch, linear, padded, patch_conv, scale

CLASS = "WanTransformer3DModel"
BLOCK = "blocks.{layer}"
TEXT_TOKENS = 512

# An image-to-video checkpoint has the last three: it is another network.
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
         "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}


def rules(model: Mapping[str, Any]) -> list[Rule]:
    """The table."""
    def attention(ours: str, theirs: str) -> list[Rule]:
        ours, theirs = f"backbone/blocks/{ours}", f"{BLOCK}.{theirs}"
        return [*linear(f"{ours}/q", f"{theirs}.to_q"), *linear(f"{ours}/k", f"{theirs}.to_k"),
                *linear(f"{ours}/v", f"{theirs}.to_v"),
                *linear(f"{ours}/out", f"{theirs}.to_out.0"),
                *scale(f"{ours}/q_norm", f"{theirs}.norm_q"),
                *scale(f"{ours}/k_norm", f"{theirs}.norm_k")]

    embedder, blocks = "condition_embedder", "backbone/blocks"
    kernel, bias = channel_last_patch(model["patch"])
    return [
        *linear("backbone/patch_in", "patch_embedding", layout=patch_conv(model["patch"])),
        *linear("backbone/text_in/hidden", f"{embedder}.text_embedder.linear_1"),
        *linear("backbone/text_in/out", f"{embedder}.text_embedder.linear_2"),
        *linear("backbone/time/hidden", f"{embedder}.time_embedder.linear_1"),
        *linear("backbone/time/out", f"{embedder}.time_embedder.linear_2"),
        *linear("backbone/modulation", f"{embedder}.time_proj"),
        Rule(f"{blocks}/modulation", (f"{BLOCK}.scale_shift_table",), padded(before=1)),
        *attention("attn", "attn1"),
        *attention("cross", "attn2"),
        *scale(f"{blocks}/cross_norm", f"{BLOCK}.norm2"),
        Rule(f"{blocks}/cross_norm/bias", (f"{BLOCK}.norm2.bias",)),
        *linear(f"{blocks}/mlp/up", f"{BLOCK}.ffn.net.0.proj"),
        *linear(f"{blocks}/mlp/down", f"{BLOCK}.ffn.net.2"),
        Rule("norm_out", ("scale_shift_table",), padded(before=1)),  # both are [shift, scale]
        Rule("proj_out/kernel", ("proj_out.weight",), kernel),
        Rule("proj_out/bias", ("proj_out.bias",), bias),
    ]


def model_from(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """transformer/config.json -> config.model; UserError for what this network cannot be."""
    fields = Fields(config, source, CLASS)
    heads = fields.integer("num_attention_heads", 40)
    head_dim = fields.integer("attention_head_dim", 128)
    channels = fields.integer("in_channels", 16)
    width = heads * head_dim
    patch = fields.integers("patch_size", (1, 2, 2))
    if len(patch) != 3:
        raise refuse(source, f"patch_size = {patch} has not three numbers")
    model = {
        "family": "wan",
        "in_channels": channels,
        "out_channels": fields.integer("out_channels", channels),
        "patch": patch,
        "width": width,
        "depth": fields.integer("num_layers", 40, LAYERS),
        "heads": heads,
        "head_dim": head_dim,
        "rope_axes": rope_axes(head_dim),
        "rope_theta": 10_000.0,
        "text_width": fields.integer("text_dim", 4096),
        "text_tokens": TEXT_TOKENS,
        "frequency_width": fields.integer("freq_dim", 256),
        "mlp_ratio": ratio(width, fields.integer("ffn_dim", 13824)),
    }
    if model["in_channels"] != model["out_channels"]:
        raise refuse(source, f"in_channels = {channels} and out_channels = "
                             f"{model['out_channels']} differ (an image-to-video model)")
    fields.finish(FIXED, ignored=("rope_max_seq_len",))
    return model


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Rotary channels of frames, rows, columns: a third each, the rest to the frames."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def ratio(width: int, hidden: int) -> float:
    """The mlp_ratio that gives `hidden` exactly (a quotient may round to one less)."""
    value = hidden / width
    while int(width * value) < hidden:
        value = math.nextafter(value, math.inf)
    return value


def config_from(model: Mapping[str, Any]) -> dict[str, Any]:
    """config.model -> transformer/config.json; UserError for what diffusers' class cannot be."""
    if model["rope_theta"] != 10_000.0:
        raise refuse("config.model", f"rope_theta = {model['rope_theta']}, diffusers' {CLASS} has "
                                     "10000")
    tokens = model["text_tokens"] if "text_tokens" in model else TEXT_TOKENS
    if tokens != TEXT_TOKENS:
        raise refuse("config.model", f"text_tokens = {tokens}, diffusers' pipeline fills texts up to "
                                     f"{TEXT_TOKENS}")
    return {
        "_class_name": CLASS,
        "patch_size": list(model["patch"]),
        "num_attention_heads": model["heads"],
        "attention_head_dim": model["head_dim"],
        "in_channels": model["in_channels"],
        "out_channels": model["out_channels"],
        "text_dim": model["text_width"],
        "freq_dim": model["frequency_width"],
        "ffn_dim": round(model["width"] * model["mlp_ratio"]),
        "num_layers": model["depth"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
