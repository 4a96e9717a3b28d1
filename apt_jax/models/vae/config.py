"""Sizes and latent statistics of the causal video VAE, and the clips that it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from apt_jax.errors import UserError
from apt_jax.models.fields import check_fields

# Per-channel statistics of the latents. Wan 2.1 and Qwen-Image publish the same numbers.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The network of AutoencoderKLWan (Wan 2.1) and AutoencoderKLQwenImage: the same one.

    Attributes:
      base: channels at full resolution.
      multipliers: channels of each resolution over `base`, from full resolution down.
      blocks: residual blocks of each resolution in the encoder; the decoder has one more.
      temporal: for each halving of height and width, whether it halves the frames too (encoder
        order).
      channels: of a pixel; latent_channels: of a latent.
      mean, std: of each latent channel; `encode` returns (z - mean) / std.
      dtype: compute dtype, "float32" or "bfloat16".
      convolution: how 3x3x3 convolutions are computed, "frames" or "volume" (see layers.py); the
        results are the same.
    """

    base: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    channels: int = 3
    latent_channels: int = 16
    mean: tuple[float, ...] = LATENTS_MEAN
    std: tuple[float, ...] = LATENTS_STD
    dtype: str = "float32"
    convolution: str = "frames"

    def __post_init__(self) -> None:
        if len(self.temporal) != len(self.multipliers) - 1:
            raise UserError(
                f"a VAE with {len(self.multipliers)} resolutions halves {len(self.multipliers) - 1}"
                f" times, but temporal has {len(self.temporal)} entries; give one for each halving")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise UserError(
                    f"the VAE's {name} has {len(getattr(self, name))} entries for "
                    f"{self.latent_channels} latent channels; give one for each")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"VAE dtype {self.dtype!r} is unknown; use 'float32' or 'bfloat16'")
        if self.convolution not in ("frames", "volume"):
            raise UserError(f"VAE convolution {self.convolution!r} is unknown; use 'frames' or "
                            "'volume'")

    @property
    def spatial(self) -> int:
        """Pixels per latent, in height and in width (8)."""
        return 2 ** len(self.temporal)

    @property
    def frames(self) -> int:
        """Frames per latent after the first, which stands for one frame alone (4)."""
        return 2 ** sum(self.temporal)

    def latent_frames(self, frames: int) -> int:
        """1 + 4k frames -> 1 + k latents; UserError naming the nearest count for any other."""
        step = self.frames
        if frames < 1 or (frames - 1) % step:
            below = max(1, 1 + (frames - 1) // step * step)
            near = below if frames < 1 or frames - below <= below + step - frames else below + step
            raise UserError(f"the VAE takes 1 + {step}k frames, not {frames}; the nearest count is "
                            f"{near}")
        return 1 + (frames - 1) // step

    def pixel_frames(self, latents: int) -> int:
        """1 + k latents -> 1 + 4k frames."""
        return 1 + (latents - 1) * self.frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent shape [F', H', W', C] of a clip; UserError for a size it cannot take."""
        for name, size in (("height", height), ("width", width)):
            if size < self.spatial or size % self.spatial:
                near = max(1, round(size / self.spatial)) * self.spatial
                raise UserError(f"the VAE takes a {name} that is a multiple of {self.spatial}, not "
                                f"{size}; the nearest is {near}")
        return (self.latent_frames(frames), height // self.spatial, width // self.spatial,
                self.latent_channels)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, what config.json holds under "vae"."""
        return {key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VAEConfig:
        """The inverse of `to_dict`; UserError for an unknown field or a value of another kind."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise UserError(f"a VAE's config has no field {name!r}; its fields are "
                                f"{', '.join(sorted(known))}")
        check_fields("a VAE's config", fields, cls)
        return cls(**{key: tuple(value) if isinstance(value, (list, tuple)) else value
                      for key, value in fields.items()})

    @classmethod
    def from_diffusers(cls, fields: Mapping[str, Any], dtype: str = "float32") -> VAEConfig:
        """From the config.json of AutoencoderKLWan or AutoencoderKLQwenImage.

        Raises UserError for a network that is not this one (Wan 2.2's, or another class).
        """
        name = fields.get("_class_name", "AutoencoderKLWan")
        if name not in ("AutoencoderKLWan", "AutoencoderKLQwenImage"):
            raise UserError(f"a VAE of class {name} is not supported; use one of Wan 2.1 or "
                            "Qwen-Image (AutoencoderKLWan, AutoencoderKLQwenImage)")
        base = fields.get("base_dim", 96)
        temporal = tuple(bool(t) for t in fields.get("temperal_downsample", (False, True, True)))
        channels = fields.get("input_channels", fields.get("in_channels", 3))
        refused = {  # fields of diffusers' class with the value that this network stands for
            "is_residual": (False,), "patch_size": (None, 1), "attn_scales": ([], ()),
            "decoder_base_dim": (None, base), "out_channels": (channels,),
            "scale_factor_temporal": (2 ** sum(temporal),),
            "scale_factor_spatial": (2 ** len(temporal),),
        }
        for field, values in refused.items():
            if field in fields and fields[field] not in values:
                raise UserError(f"the VAE has {field} = {fields[field]!r}, which is not Wan 2.1's "
                                "or Qwen-Image's network; use one of those (Wan 2.2's VAE is "
                                "another)")
        return cls(
            base=base, multipliers=tuple(fields.get("dim_mult", (1, 2, 4, 4))),
            blocks=fields.get("num_res_blocks", 2), temporal=temporal, channels=channels,
            latent_channels=fields.get("z_dim", 16),
            mean=tuple(fields.get("latents_mean", LATENTS_MEAN)),
            std=tuple(fields.get("latents_std", LATENTS_STD)), dtype=dtype)
