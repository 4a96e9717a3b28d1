"""The causal video VAE of Wan 2.1 and Qwen-Image: 16 latent channels, 8x8 pixels and 4 frames each."""

from apt_jax.models.vae.config import VAEConfig
from apt_jax.models.vae.model import VAE, make_vae

__all__ = ["VAE", "VAEConfig", "make_vae"]
