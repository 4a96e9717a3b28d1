"""Parameter names: diffusers' QwenImageTransformer2DModel -> our MMDiT.

A torch Linear stores [out, in], ours [in, out]. Our qkv columns are [q | k | v]. The blocks of the
reference are numbered, ours are one set of leaves with a leading depth axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LINEAR, SCALE = "linear", "scale"

# our path -> (kind, names in the reference; several are joined along the output axis)
TOP = {
    "backbone/video_in": (LINEAR, ["img_in"]),
    "backbone/text_norm": (SCALE, ["txt_norm"]),
    "backbone/text_in": (LINEAR, ["txt_in"]),
    "backbone/time/hidden": (LINEAR, ["time_text_embed.timestep_embedder.linear_1"]),
    "backbone/time/out": (LINEAR, ["time_text_embed.timestep_embedder.linear_2"]),
    "norm_out": (LINEAR, ["norm_out.linear"]),  # AdaLayerNormContinuous: [scale | shift]
    "proj_out": (LINEAR, ["proj_out"]),
}
BLOCK = {
    "video/modulation": (LINEAR, ["img_mod.1"]),
    "video/qkv": (LINEAR, ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "video/q_norm": (SCALE, ["attn.norm_q"]),
    "video/k_norm": (SCALE, ["attn.norm_k"]),
    "video/out": (LINEAR, ["attn.to_out.0"]),
    "video/mlp/up": (LINEAR, ["img_mlp.net.0.proj"]),
    "video/mlp/down": (LINEAR, ["img_mlp.net.2"]),
    "text/modulation": (LINEAR, ["txt_mod.1"]),
    "text/qkv": (LINEAR, ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    "text/q_norm": (SCALE, ["attn.norm_added_q"]),
    "text/k_norm": (SCALE, ["attn.norm_added_k"]),
    "text/out": (LINEAR, ["attn.to_add_out"]),
    "text/mlp/up": (LINEAR, ["txt_mlp.net.0.proj"]),
    "text/mlp/down": (LINEAR, ["txt_mlp.net.2"]),
}


def from_reference(weights: Mapping[str, np.ndarray], depth: int) -> dict:
    """A reference state dict (numpy) -> our nested params. KeyError or ValueError if a name is
    missing or left over."""
    left = dict(weights)

    def take(kind: str, names: list[str]) -> dict[str, np.ndarray]:
        if kind == SCALE:
            return {"scale": left.pop(names[0] + ".weight")}
        return {
            "kernel": np.concatenate([left.pop(n + ".weight").T for n in names], axis=1),
            "bias": np.concatenate([left.pop(n + ".bias") for n in names]),
        }

    params: dict = {}

    def put(path: str, leaves: dict[str, np.ndarray]) -> None:
        node = params
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node.update(leaves)

    for path, (kind, names) in TOP.items():
        put(path, take(kind, names))
    for path, (kind, names) in BLOCK.items():
        layers = [
            take(kind, [f"transformer_blocks.{i}.{n}" for n in names]) for i in range(depth)
        ]
        put(f"backbone/blocks/{path}", {k: np.stack([x[k] for x in layers]) for k in layers[0]})
    if left:
        raise ValueError(f"reference weights without a place: {sorted(left)}")
    return params
