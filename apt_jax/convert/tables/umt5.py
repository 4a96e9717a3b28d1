"""UMT5's encoder: transformers' UMT5EncoderModel <-> models/umt5.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_jax.convert.configs import LAYERS, Fields
from apt_jax.convert.table import Rule, linear, scale

LAYER = "encoder.block.{layer}.layer"

# Fields that this encoder has built in. A config of transformers has many more that do not matter.
FIXED = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True,
         "layer_norm_epsilon": 1e-6}

# The embedding has two names; a file has one of them, or both with the same values.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}


def rules(umt5: Mapping[str, Any]) -> list[Rule]:
    """The table."""
    attention, mlp = f"{LAYER}.0.SelfAttention", f"{LAYER}.1.DenseReluDense"
    found = [
        Rule("embedding", ("shared.weight",)),
        *scale("blocks/attn_norm", f"{LAYER}.0.layer_norm"),
        Rule("blocks/positions", (f"{attention}.relative_attention_bias.weight",)),
        *scale("blocks/mlp_norm", f"{LAYER}.1.layer_norm"),
        *scale("norm", "encoder.final_layer_norm"),
    ]
    for ours, theirs in (("q", f"{attention}.q"), ("k", f"{attention}.k"), ("v", f"{attention}.v"),
                         ("out", f"{attention}.o"), ("gate", f"{mlp}.wi_0"), ("up", f"{mlp}.wi_1"),
                         ("down", f"{mlp}.wo")):
        found += linear(f"blocks/{ours}", theirs, bias=False)
    return found


def config_from_theirs(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """text_encoder/config.json -> the fields of UMT5Config, plain."""
    fields = Fields(config, source, "umt5", key="model_type")
    found = {
        "vocabulary": fields.integer("vocab_size", 250_112),
        "width": fields.integer("d_model", 512),
        "depth": fields.integer("num_layers", 8, LAYERS),
        "heads": fields.integer("num_heads", 6),
        "head_dim": fields.integer("d_kv", 64),
        "mlp_width": fields.integer("d_ff", 1024),
        "buckets": fields.integer("relative_attention_num_buckets", 32),
        "max_distance": fields.integer("relative_attention_max_distance", 128),
    }
    fields.finish(FIXED, strict=False)
    return found
