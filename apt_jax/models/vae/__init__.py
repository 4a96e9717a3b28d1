"""The causal video VAE of Wan 2.1 and Qwen-Image: 16 latent channels, 8x8x4 each."""

from apt_jax.models.vae.config import VAEConfig
from apt_jax.models.vae.frames import FrameDecoder
from apt_jax.models.vae.io import load_vae, save_vae
from apt_jax.models.vae.model import VAE, make_vae
from apt_jax.models.vae.sharded import decode_sharded, encode_sharded
from apt_jax.models.vae.tiling import Tiling

__all__ = ["VAE", "FrameDecoder", "Tiling", "VAEConfig", "decode_sharded", "encode_sharded",
           "load_vae", "make_vae", "save_vae"]
