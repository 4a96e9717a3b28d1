"""Wan 2.1: text-to-video diffusion transformer of Wan Team (arXiv 2503.20314)."""

from apt_jax.models.wan.config import WanConfig
from apt_jax.models.wan.model import Backbone, Wan

__all__ = ["Backbone", "Wan", "WanConfig"]
