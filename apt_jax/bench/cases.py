"""The attention shapes that are measured, and which kernels each backend must leave in a program."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One attention.

    Attributes:
      hidden: keys at the front that a mask hides (padding of the text); None is no mask at all.
      plain: every backend leaves this one to plain JAX (too few queries for a kernel).
    """

    name: str
    queries: int
    keys: int
    heads: int
    head_dim: int
    hidden: int | None = None
    batch: int = 1
    dtype: str = "bfloat16"
    plain: bool = False

    @property
    def flops(self) -> dict[str, float]:
        """Model FLOPs: forward, and backward (2.5 times as many, scores computed again)."""
        forward = 4.0 * self.batch * self.heads * self.queries * self.keys * self.head_dim
        return {"forward": forward, "backward": 2.5 * forward}

    def abstract(self, sharding=None) -> list[jax.ShapeDtypeStruct]:
        """q, k, v and, where there is one, the mask."""
        dtype = jnp.dtype(self.dtype)

        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        q = array((self.batch, self.queries, self.heads, self.head_dim), dtype)
        k = array((self.batch, self.keys, self.heads, self.head_dim), dtype)
        mask = [] if self.hidden is None else [array((self.batch, self.keys), jnp.bool_)]
        return [q, k, k, *mask]

    def arrays(self, seed: int) -> list[jax.Array]:
        """Random inputs, drawn on the device: 47,000 tokens take numpy eleven seconds."""
        return _arrays(self, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def _arrays(case: AttentionCase, key: jax.Array) -> list[jax.Array]:
    shapes = case.abstract()[:3]
    made = [jax.random.normal(k, x.shape, jnp.float32).astype(x.dtype)
            for k, x in zip(jax.random.split(key, 3), shapes, strict=True)]
    if case.hidden is not None:
        made.append(jnp.broadcast_to(jnp.arange(case.keys) >= case.hidden, (case.batch, case.keys)))
    return made


CASES: dict[str, AttentionCase] = {c.name: c for c in (
    # 49 x 720 x 1280 through a VAE of stride 4 x 8 x 8 and patches of 2 x 2, with 256 text tokens
    AttentionCase("8b_720p_joint", 46_800 + 256, 46_800 + 256, 24, 128, hidden=100),
    AttentionCase("8b_720p_no_mask", 47_104, 47_104, 24, 128),
    AttentionCase("8b_720p_of_8_gpus", 46_800 + 256, 46_800 + 256, 3, 128, hidden=100),
    AttentionCase("16k", 16_384, 16_384, 16, 128),
    # 81 x 480 x 832
    AttentionCase("wan_480p_self", 32_760, 32_760, 12, 128),
    AttentionCase("wan_480p_cross", 32_760, 512, 12, 128),
    AttentionCase("prime_head_64", 16_411, 16_411, 16, 64, hidden=17, batch=2),
    AttentionCase("one_query", 1, 46_800, 24, 128, plain=True),
)}

# backend -> {what a kernel's line in the compiled program says: how often (forward, gradient)}
MARKERS: dict[str, dict[str, tuple[int, int]]] = {
    "pallas": {"apt_flash_forward": (1, 1), "apt_flash_dkv": (0, 1), "apt_flash_dq": (0, 1)},
    "hopper": {"apt_hopper_forward": (1, 1), "apt_hopper_dkv": (0, 1), "apt_hopper_dq": (0, 1)},
    "tokamax": {"mosaic_gpu": (1, 3)},
    "cudnn": {'"__cudnn$fmhaSoftmax"': (1, 1), '"__cudnn$fmhaSoftmaxBackward"': (0, 1)},
    "cudnn_fp8": {'"__cudnn$fmhaSoftmaxF8"': (1, 0)},
    "splash": {"splash_mha_fwd": (1, 1), "splash_mha_dkv": (0, 1), "splash_mha_dq": (0, 1)},
}
BACKENDS_OF = {"cuda": ("pallas", "hopper", "tokamax", "cudnn", "cudnn_fp8"), "tpu": ("splash",)}
INFERENCE_ONLY = ("cudnn_fp8",)


def parts_of_backend(backend: str) -> tuple[str, ...]:
    """What of attention or a block this backend computes."""
    return ("forward",) if backend in INFERENCE_ONLY else ("forward", "gradient")
