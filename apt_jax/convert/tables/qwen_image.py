"""Qwen-Image's transformer: diffusers' QwenImageTransformer2DModel <-> models/mmdit.py.

The shared modulation has no class in diffusers; its names are Qwen-Image's where the two agree, and
the class is that of assets/mmdit_shared.py, which an export puts beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_jax.convert.configs import LAYERS, Fields, refuse
from apt_jax.convert.table import Rule, linear, scale

CLASS = "QwenImageTransformer2DModel"
SHARED_CLASS = "MMDiTShared"
BLOCK = "transformer_blocks.{layer}"

# Fields that a checkpoint may state but not change: they would make it another network.
FIXED = {"guidance_embeds": False, "zero_cond_t": False, "use_additional_t_cond": False,
         "use_layer3d_rope": False}


def rules(model: Mapping[str, Any]) -> list[Rule]:
    """The table, for either modulation."""
    shared = model["modulation"] == "shared"

    def stream(ours: str, qkv: tuple[str, ...], out: str, norms: tuple[str, str], mod: str,
               mlp: str) -> list[Rule]:
        ours = f"backbone/blocks/{ours}"
        return [
            *([Rule(f"{ours}/modulation", (f"{BLOCK}.{mod}",))] if shared else
              linear(f"{ours}/modulation", f"{BLOCK}.{mod}.1")),
            *linear(f"{ours}/qkv", *(f"{BLOCK}.attn.{name}" for name in qkv)),
            *scale(f"{ours}/q_norm", f"{BLOCK}.attn.{norms[0]}"),
            *scale(f"{ours}/k_norm", f"{BLOCK}.attn.{norms[1]}"),
            *linear(f"{ours}/out", f"{BLOCK}.attn.{out}"),
            *linear(f"{ours}/mlp/up", f"{BLOCK}.{mlp}.net.0.proj"),
            *linear(f"{ours}/mlp/down", f"{BLOCK}.{mlp}.net.2"),
        ]

    modulation = linear("backbone/modulation", "modulation") if shared else []
    time = "time_text_embed.timestep_embedder"
    return [
        *linear("backbone/video_in", "img_in"),
        *scale("backbone/text_norm", "txt_norm"),
        *linear("backbone/text_in", "txt_in"),
        *linear("backbone/time/hidden", f"{time}.linear_1"),
        *linear("backbone/time/out", f"{time}.linear_2"),
        *modulation,
        *stream("video", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k"), "img_mod",
                "img_mlp"),
        *stream("text", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
                ("norm_added_q", "norm_added_k"), "txt_mod", "txt_mlp"),
        *linear("norm_out", "norm_out.linear"),  # both are [scale | shift]
        *linear("proj_out", "proj_out"),
    ]


def model_from(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """transformer/config.json -> config.model; UserError for what this network cannot be."""
    fields = Fields(config, source, CLASS)
    patch = fields.integer("patch_size", 2)
    channels = fields.integer("in_channels", 64)
    heads, head_dim = fields.integer("num_attention_heads", 24), fields.integer(
        "attention_head_dim", 128)
    if channels % patch**2:
        raise refuse(source, f"in_channels = {channels} is not a multiple of patch_size squared")
    axes = fields.integers("axes_dims_rope", (16, 56, 56))
    if len(axes) != 3 or sum(axes) != head_dim or any(axis < 2 or axis % 2 for axis in axes):
        raise refuse(source, f"axes_dims_rope = {list(axes)} are not three even numbers that make "
                             f"up attention_head_dim = {head_dim}")
    model = {
        "in_channels": channels // patch**2,
        "out_channels": fields.integer("out_channels", 16),
        "patch": (1, patch, patch),
        "width": heads * head_dim,
        "depth": fields.integer("num_layers", 60, LAYERS),
        "heads": heads,
        "head_dim": head_dim,
        "rope_axes": axes,
        "rope_theta": 10_000.0,
        "text_width": fields.integer("joint_attention_dim", 3584),
        "mlp_ratio": 4.0,
        "modulation": "per_block",
    }
    fields.finish(FIXED, ignored=("pooled_projection_dim",))
    return model


def config_from(model: Mapping[str, Any]) -> dict[str, Any]:
    """config.model -> transformer/config.json; UserError for what diffusers' class cannot be."""
    if model["modulation"] == "shared":
        names = ("in_channels", "out_channels", "patch", "width", "depth", "heads", "head_dim",
                 "rope_axes", "rope_theta", "text_width", "mlp_ratio")
        return {"_class_name": SHARED_CLASS, **{
            name: list(model[name]) if isinstance(model[name], tuple) else model[name]
            for name in names}}
    for key, want in (("modulation", "per_block"), ("mlp_ratio", 4.0), ("rope_theta", 10_000.0)):
        if model[key] != want:
            raise refuse("config.model", f"{key} = {model[key]!r}, diffusers' {CLASS} has {want!r}")
    frames, rows, columns = model["patch"]
    if frames != 1 or rows != columns:
        raise refuse("config.model", f"patch = {tuple(model['patch'])}, diffusers' {CLASS} has "
                                     "square patches of one frame")
    return {
        "_class_name": CLASS,
        "patch_size": rows,
        "in_channels": model["in_channels"] * rows**2,
        "out_channels": model["out_channels"],
        "num_layers": model["depth"],
        "attention_head_dim": model["head_dim"],
        "num_attention_heads": model["heads"],
        "joint_attention_dim": model["text_width"],
        "axes_dims_rope": list(model["rope_axes"]),
        "guidance_embeds": False,
    }
