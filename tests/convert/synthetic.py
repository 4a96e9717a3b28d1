"""Checkpoints in diffusers' layout without torch: names and shapes from the tables."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from apt_jax.convert.families import (
    FAMILIES,
    family_of_model,
    transformer_plan,
    umt5_plan,
    vae_plan,
)
from apt_jax.tensor_files import Spec, write_files

WAN = {
    "family": "wan", "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2), "width": 24,
    "depth": 3, "heads": 2, "head_dim": 12, "rope_axes": (4, 4, 4), "rope_theta": 10_000.0,
    "text_width": 20, "text_tokens": 512, "frequency_width": 32, "mlp_ratio": 40 / 24,
}
QWEN = {
    "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2), "width": 24, "depth": 2, "heads": 2,
    "head_dim": 12, "rope_axes": (4, 4, 4), "rope_theta": 10_000.0, "text_width": 20,
    "mlp_ratio": 4.0, "modulation": "per_block",
}
VAE = {"base": 8, "multipliers": [1, 2, 4, 4], "blocks": 1, "temporal": [False, True, True],
       "channels": 3, "latent_channels": 16}
UMT5 = {"vocabulary": 64, "width": 20, "depth": 2, "heads": 2, "head_dim": 6, "mlp_width": 28}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def values(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Random values that differ between names."""
    rng = np.random.default_rng(list(name.encode()))
    return rng.standard_normal(shape, np.float32).astype(dtype)


def write_tensors(folder: Path, stem: str, shapes: dict, *, dtype=BFLOAT16, odd=(),
                  limit: int = 10**9) -> dict[str, np.ndarray]:
    """Writes tensors of these shapes; those whose name contains a word of `odd` as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = [Spec(name, np.dtype(np.float32) if any(w in name for w in odd) else dtype, shape)
             for name, shape in shapes.items()]
    tensors = {s.name: values(s.name, s.shape, s.dtype) for s in specs}
    write_files(folder, stem, specs, tensors.values(), limit=limit, metadata={"format": "pt"})
    return tensors


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_transformer(folder: Path, model: dict, **more) -> dict[str, np.ndarray]:
    """A transformer folder; its tensors are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", family_of_model(model).table.config_from(model))
    return write_tensors(folder, "diffusion_pytorch_model", transformer_plan(model).theirs, **more)


def write_pipeline(folder: Path, model: dict = WAN, **more) -> dict[str, np.ndarray]:
    """A pipeline folder with all that an import asks for; its transformer's tensors."""
    family = family_of_model(model)
    assert family in FAMILIES
    tensors = write_transformer(folder / "transformer", model, **more)
    vae_class = "AutoencoderKLWan" if family.name == "wan" else "AutoencoderKLQwenImage"
    text_class = ("UMT5EncoderModel" if family.name == "wan" else
                  "Qwen2_5_VLForConditionalGeneration")
    write_json(folder / "model_index.json", {
        "_class_name": family.pipeline, "_diffusers_version": "0.35.0",
        "transformer": ["diffusers", family.table.CLASS], "vae": ["diffusers", vae_class],
        "text_encoder": ["transformers", text_class],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"]})
    write_json(folder / "vae" / "config.json", {
        "_class_name": vae_class, "base_dim": VAE["base"], "dim_mult": VAE["multipliers"],
        "num_res_blocks": VAE["blocks"], "temperal_downsample": VAE["temporal"], "z_dim": 16})
    write_tensors(folder / "vae", "diffusion_pytorch_model", vae_plan(VAE).theirs)
    write_json(folder / "text_encoder" / "config.json", {
        "model_type": "umt5", "vocab_size": UMT5["vocabulary"], "d_model": UMT5["width"],
        "num_layers": UMT5["depth"], "num_heads": UMT5["heads"], "d_kv": UMT5["head_dim"],
        "d_ff": UMT5["mlp_width"], "feed_forward_proj": "gated-gelu", "use_cache": True})
    write_tensors(folder / "text_encoder", "model", umt5_plan(UMT5).theirs)
    write_json(folder / "tokenizer" / "tokenizer.json", {"model": {}})
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "UniPC",
                                                                  "flow_shift": 7})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Base\n")
    return tensors
