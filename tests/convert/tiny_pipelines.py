"""Whole pipelines of diffusers with random weights, small enough for a test (needs torch).

Every parameter is random, so that no zero initialisation hides a part of a network.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

WORDS = ("a", "cat", "dog", "red", "heart", "surfing", "beach", "running", "blue", "car", "on",
         "the")
TEXT_WIDTH = 24
CHANNELS = 16  # of the latents, fixed by the VAE's statistics


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Parameters of unit gain; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2 and "table" not in name and "gamma" not in name:
                p.copy_(noise / math.sqrt(p[0].numel()))
            else:
                p.copy_(0.3 * noise + ("norm" in name and "bias" not in name))
    return model.eval()


def wan_transformer(depth: int = 3, seed: int = 1):
    """heads 2 of 12: rotary axes 4, 4, 4; feed-forward 40 is no multiple of the width 24."""
    from diffusers import WanTransformer3DModel

    return randomise(WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, freq_dim=32, ffn_dim=40, num_layers=depth), seed)


def qwen_transformer(depth: int = 2, seed: int = 2):
    from diffusers import QwenImageTransformer2DModel

    return randomise(QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=depth,
        attention_head_dim=12, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4)), seed)


def wan_vae(seed: int = 3):
    from diffusers import AutoencoderKLWan

    return randomise(AutoencoderKLWan(base_dim=8, z_dim=CHANNELS, num_res_blocks=1), seed)


def qwen_vae(seed: int = 4):
    from diffusers import AutoencoderKLQwenImage

    return randomise(AutoencoderKLQwenImage(base_dim=8, z_dim=CHANNELS, num_res_blocks=1), seed)


def umt5(seed: int = 5):
    from transformers import UMT5Config, UMT5EncoderModel

    return randomise(UMT5EncoderModel(UMT5Config(
        vocab_size=64, d_model=TEXT_WIDTH, d_kv=6, d_ff=40, num_layers=2, num_heads=4)), seed)


def t5_tokenizer():
    """A word-level tokenizer with T5's special tokens, saved as tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=512)


def save_wan(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A WanPipeline folder with the stock scheduler's kind (UniPC) and a README.md."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(tokenizer=t5_tokenizer(), text_encoder=umt5().to(dtype), vae=wan_vae(),
                scheduler=scheduler, transformer=wan_transformer().to(dtype),
                ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return folder


def save_qwen(folder: Path) -> Path:
    """A QwenImagePipeline folder: real classes, but a text encoder of two small layers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, base_shift=0.5, max_shift=0.9,
        base_image_seq_len=256, max_image_seq_len=8192)
    QwenImagePipeline(scheduler=scheduler, vae=qwen_vae(), text_encoder=_qwen_text_encoder(),
                      tokenizer=_qwen_tokenizer(folder), transformer=qwen_transformer(),
                      ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return folder


def _qwen_text_encoder():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(vocab_size=320, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
                rope_scaling={"type": "mrope", "mrope_section": [2, 2, 2]},
                bos_token_id=256, eos_token_id=257, pad_token_id=257)
    vision = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=24,
                  fullatt_block_indexes=[0])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=258,
                              video_token_id=259, vision_start_token_id=260,
                              vision_end_token_id=261)
    return randomise(Qwen2_5_VLForConditionalGeneration(config), 6)


def _qwen_tokenizer(folder: Path):
    """Byte-level, one token a byte: vocab.json and merges.txt, as the real one is stored."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {c: i for i, c in enumerate((*alphabet, *specials))}
    scratch = Path(folder).with_name(Path(folder).name + "-tokenizer")
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "vocab.json").write_text(json.dumps(vocabulary))
    (scratch / "merges.txt").write_text("#version: 0.2\n")
    (scratch / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 2048}))
    return Qwen2Tokenizer.from_pretrained(str(scratch))
