"""The sizes of public networks, as fields of config.model.

Plain data, so that a config file costs no import of jax:

    config = base_config()
    use_network(config, "wan_1_3b")
"""

from __future__ import annotations

from typing import Any

import ml_collections

from apt_jax.config.load import nearest
from apt_jax.errors import UserError

# Latents of the causal VAE that Wan and Qwen-Image share: 16 channels, 8 x 8 x 4 smaller.
_LATENT = {"in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
_WAN = {
    **_LATENT, "family": "wan", "head_dim": 128, "rope_axes": (44, 42, 42), "text_width": 4096,
    "text_tokens": 512, "frequency_width": 256,
}

NETWORKS: dict[str, dict[str, Any]] = {
    # Wan 2.1 T2V 1.3B: 1,418,996,800 parameters
    "wan_1_3b": {**_WAN, "width": 1536, "depth": 30, "heads": 12, "mlp_ratio": 8960 / 1536},
    # Wan 2.1 T2V 14B: 14,288,491,584
    "wan_14b": {**_WAN, "width": 5120, "depth": 40, "heads": 40, "mlp_ratio": 13_824 / 5120},
    # Qwen-Image: 20,430,401,088; text states of Qwen2.5-VL 7B
    "qwen_image": {
        **_LATENT, "family": "mmdit", "modulation": "per_block", "width": 3072, "depth": 60,
        "heads": 24, "head_dim": 128, "rope_axes": (16, 56, 56), "text_width": 3584,
        "mlp_ratio": 4.0,
    },
}


def use_network(config: ml_collections.ConfigDict, name: str) -> None:
    """Sets config.model to a network of NETWORKS; dtype and remat stay. UserError for a name that
    is not there."""
    if name not in NETWORKS:
        raise UserError(f"no network {name!r}{nearest(name, NETWORKS)}")
    config.model.update(NETWORKS[name])
