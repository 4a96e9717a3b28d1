"""From a config to networks."""

from __future__ import annotations

import dataclasses
from typing import Any

from apt_jax.models.discriminator import Discriminator, default_taps
from apt_jax.models.mmdit import MMDiT, MMDiTConfig
from apt_jax.nn.functional import Network


def model_config(model: Any) -> MMDiTConfig:
    """config.model (an ml_collections ConfigDict or a plain dict of the same fields) -> MMDiTConfig."""
    names = [f.name for f in dataclasses.fields(MMDiTConfig)]
    fields = {name: model[name] for name in names if name in model}
    for name in ("patch", "rope_axes"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return MMDiTConfig(**fields)


def make_generator(model: Any) -> Network:
    """The velocity network of config.model: net(params, x, t, text, text_mask) -> v."""
    config = model_config(model)
    return Network.build(lambda rngs: MMDiT(config, rngs=rngs))


def discriminator_taps(model: Any, discriminator: Any) -> tuple[int, ...]:
    """The blocks D's heads look at: config.discriminator.taps, or the paper's fractions of the depth."""
    return tuple(discriminator["taps"]) or default_taps(model["depth"])


def make_discriminator(model: Any, discriminator: Any) -> Network:
    """The discriminator of config.model and config.discriminator: net(params, x, t, text, mask) -> [B]."""
    taps = discriminator_taps(model, discriminator)
    config = dataclasses.replace(model_config(model), depth=taps[-1])
    heads = discriminator["heads"] or config.heads
    return Network.build(lambda rngs: Discriminator(config, taps, heads, rngs=rngs))
