"""Parameter names: transformers' UMT5EncoderModel -> our UMT5, written apart from convert/."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

KERNELS = {
    **{k: f"0.SelfAttention.{k}" for k in "qkv"}, "out": "0.SelfAttention.o",
    "gate": "1.DenseReluDense.wi_0", "up": "1.DenseReluDense.wi_1", "down": "1.DenseReluDense.wo",
}


def from_reference(weights: Mapping[str, np.ndarray], depth: int) -> dict:
    """A reference state dict (numpy) -> our nested params; ValueError if a name is left over."""
    left = dict(weights)

    def layers(name: str) -> np.ndarray:
        return np.stack([left.pop(f"encoder.block.{i}.layer.{name}.weight") for i in range(depth)])

    params = {
        "embedding": left.pop("shared.weight"),
        "norm": {"scale": left.pop("encoder.final_layer_norm.weight")},
        "blocks": {
            "attn_norm": {"scale": layers("0.layer_norm")},
            "mlp_norm": {"scale": layers("1.layer_norm")},
            "positions": layers("0.SelfAttention.relative_attention_bias"),
            **{k: {"kernel": layers(name).swapaxes(1, 2)} for k, name in KERNELS.items()},
        },
    }
    if left:
        raise ValueError(f"reference weights without a place: {sorted(left)}")
    return params
