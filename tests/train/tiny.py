"""The smallest real run: the real networks at width 16, 4 px samples, a handful of captions."""

from __future__ import annotations

import numpy as np

from apt_jax.config import base_config

TEXT_WIDTH, TOKENS, PIXELS = 8, 3, 4


def tiny_config(stage: str = "pretrain", batch_size: int = 8, **overrides):
    """A config of width 16 and depth 2; overrides are dotted keys with "__" for the dot."""
    config = base_config()
    config.name, config.stage = "tiny", stage
    config.data.height = config.data.width = PIXELS
    config.data.max_text_tokens = TOKENS
    config.model.width, config.model.heads, config.model.head_dim = 16, 2, 8
    config.model.rope_axes, config.model.depth = (2, 2, 4), 2
    config.model.text_width, config.model.mlp_ratio = TEXT_WIDTH, 2
    config.discriminator.taps, config.discriminator.heads = (2,), 2
    config.train.batch_size, config.train.steps, config.train.log_every = batch_size, 4, 2
    for key, value in overrides.items():
        *groups, leaf = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[leaf] = value
    return config


def tiny_batch(batch_size: int = 8, seed: int = 0, padded: int = 0,
               pixels: int = PIXELS) -> dict[str, np.ndarray]:
    """A random batch; the last `padded` samples have loss_mask 0."""
    rng = np.random.default_rng(seed)
    mask = np.ones(batch_size, np.float32)
    mask[batch_size - padded:] = 0
    text_mask = np.ones((batch_size, TOKENS), bool)
    text_mask[::2, -1] = False
    text = rng.normal(size=(batch_size, TOKENS, TEXT_WIDTH)).astype(np.float32)
    return {"x": rng.uniform(-1, 1, (batch_size, 1, pixels, pixels, 3)).astype(np.float32),
            "text": text * text_mask[..., None], "text_mask": text_mask, "loss_mask": mask,
            "index": np.arange(batch_size, dtype=np.int32)}


def emoji_config(stage: str = "pretrain", **overrides):
    """`tiny_config` on the bundled emoji at 4 px, checkpoints every 2 of 4 updates."""
    real = {"model__text_width": 384, "data__max_text_tokens": 6, "train__checkpoint_every": 2,
            "data__threads": 0, "optimizer__learning_rate": 1e-3}
    return tiny_config(stage, **{**real, **overrides})


def random_weights(folder, seed: int = 0):
    """A weights folder for `emoji_config` with nothing left at zero; returns its path as text."""
    import jax

    from apt_jax.models.presets import make_generator
    from apt_jax.weights import save_generator

    config = emoji_config()
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape)).astype(np.float32),
                          make_generator(config.model).abstract())
    return str(save_generator(folder, config.model, params))
