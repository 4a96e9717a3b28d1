"""Parameter names: diffusers' WanTransformer3DModel -> our Wan, written apart from convert/.

A torch Linear stores [out, in], ours [in, out]. The reference's patch embedding is a convolution,
and its output tokens have the channels last; ours have them first, on both ends.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

TOP = {
    "backbone/text_in/hidden": "condition_embedder.text_embedder.linear_1",
    "backbone/text_in/out": "condition_embedder.text_embedder.linear_2",
    "backbone/time/hidden": "condition_embedder.time_embedder.linear_1",
    "backbone/time/out": "condition_embedder.time_embedder.linear_2",
    "backbone/modulation": "condition_embedder.time_proj",
}
BLOCK = {
    **{f"{ours}/{a}": f"{theirs}.to_{b}" for ours, theirs in (("attn", "attn1"), ("cross", "attn2"))
       for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out.0"))},
    "mlp/up": "ffn.net.0.proj",
    "mlp/down": "ffn.net.2",
}
SCALES = {f"{ours}/{n}_norm": f"{theirs}.norm_{n}" for ours, theirs in
          (("attn", "attn1"), ("cross", "attn2")) for n in "qk"}


def from_reference(weights: Mapping[str, np.ndarray], depth: int, patch=(1, 2, 2)) -> dict:
    """A reference state dict (numpy) -> our nested params. KeyError or ValueError if a name is
    missing or left over."""
    left, params = dict(weights), {}

    def put(path: str, **leaves: np.ndarray) -> None:
        node = params
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node.update(leaves)

    def layers(name: str) -> np.ndarray:
        return np.stack([left.pop(f"blocks.{i}.{name}") for i in range(depth)])

    kernel = left.pop("patch_embedding.weight")  # [D, C, pt, ph, pw]
    put("backbone/patch_in", kernel=kernel.reshape(len(kernel), -1).T,
        bias=left.pop("patch_embedding.bias"))
    for path, name in TOP.items():
        put(path, kernel=left.pop(f"{name}.weight").T, bias=left.pop(f"{name}.bias"))
    for path, name in BLOCK.items():
        put(f"backbone/blocks/{path}", kernel=layers(f"{name}.weight").swapaxes(1, 2),
            bias=layers(f"{name}.bias"))
    for path, name in SCALES.items():
        put(f"backbone/blocks/{path}", scale=layers(f"{name}.weight"))
    put("backbone/blocks/cross_norm", scale=layers("norm2.weight"), bias=layers("norm2.bias"))
    put("backbone/blocks", modulation=layers("scale_shift_table")[:, 0])
    put("proj_out", **{
        ours: _channels_first(left.pop(f"proj_out.{theirs}").T, patch)
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))})
    params["norm_out"] = left.pop("scale_shift_table")[0]
    if left:
        raise ValueError(f"reference weights without a place: {sorted(left)}")
    return params


def _channels_first(columns: np.ndarray, patch) -> np.ndarray:
    """[..., pt ph pw C] -> [..., C pt ph pw]."""
    cut = columns.reshape(*columns.shape[:-1], int(np.prod(patch)), -1)
    return cut.swapaxes(-1, -2).reshape(columns.shape)
