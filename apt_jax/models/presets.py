"""From a config to networks: the families that model.family names, and how each is put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from apt_jax.errors import UserError
from apt_jax.models import mmdit, wan
from apt_jax.models.discriminator import Discriminator, default_taps
from apt_jax.nn.fp8 import with_fp8
from apt_jax.nn.functional import Network
from apt_jax.nn.lora import adapted


class Family(NamedTuple):
    """What a family of networks consists of: each part is made as part(config, rngs=rngs)."""

    config: type  # a dataclass of sizes, its fields named as in config.model
    backbone: Callable[..., nnx.Module]  # (x, t, text, text_mask, taps) -> tokens, tapped, time
    generator: Callable[..., nnx.Module]  # (x, t, text, text_mask) -> velocity


FAMILIES: dict[str, Family] = {
    "mmdit": Family(mmdit.MMDiTConfig, mmdit.Backbone, mmdit.MMDiT),
    "wan": Family(wan.WanConfig, wan.Backbone, wan.Wan),
}


def family_of(model: Any) -> Family:
    """The family of config.model; weights that name none are older than the field, and MMDiTs."""
    name = model["family"] if "family" in model else "mmdit"
    if name not in FAMILIES:
        raise UserError(f"model.family = {name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_config(model: Any) -> Any:
    """config.model (an ml_collections ConfigDict or a plain dict of the same fields) -> MMDiTConfig
    or WanConfig. Fields that the family does not have are left out."""
    kind = family_of(model).config
    names = [f.name for f in dataclasses.fields(kind)]
    fields = {name: model[name] for name in names if name in model}
    for name in ("patch", "rope_axes"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return kind(**fields)


def attention_of(model: Any) -> str:
    """config.model.attention; weights that name no kernel are older than the field."""
    return model["attention"] if "attention" in model else "auto"


def matmul_of(section: Any) -> str:
    """"dtype" or "fp8", of config.model or config.discriminator; weights that say nothing are older
    than the field."""
    return section["matmul"] if "matmul" in section else "dtype"


def _fp8_of(section: Any) -> int | None:
    """How many of the last blocks keep their dtype where the others multiply in eight bits, else None."""
    if matmul_of(section) != "fp8":
        return None
    return section["matmul_kept"] if "matmul_kept" in section else 0


def adapter_scale(lora: Any) -> float:
    """What the adapters of config.lora are multiplied by: alpha over rank, alpha = 0 being rank."""
    return (lora["alpha"] or lora["rank"]) / lora["rank"]


def _adapters_of(lora: Any) -> tuple[int, float] | None:
    return (lora["rank"], adapter_scale(lora)) if lora and lora["rank"] else None


def _changed(make: Callable[..., nnx.Module], fp8: int | None,
             adapters: tuple[int, float] | None) -> Callable[..., nnx.Module]:
    if fp8 is not None:
        make = with_fp8(make, fp8)
    return make if adapters is None else adapted(make, *adapters)


# A network is traced once for all in a process who ask for it, which a study does some fifty times, and
# each trace takes a fifth of a second. What they get is a new Network nonetheless: networks are
# compared by identity, and each has its own programs.
@functools.lru_cache(maxsize=64)
def _generator(family: Family, config: Any, fp8: int | None,
               adapters: tuple[int, float] | None) -> Network:
    make = _changed(family.generator, fp8, adapters)
    return Network.build(lambda rngs: make(config, rngs=rngs))


@functools.lru_cache(maxsize=64)
def _discriminator(family: Family, config: Any, fp8: int | None,
                   adapters: tuple[int, float] | None, taps: tuple[int, ...],
                   heads: int) -> Network:
    make = _changed(family.backbone, fp8, adapters)
    return Network.build(lambda rngs: Discriminator(config, taps, heads, backbone=make, rngs=rngs))


def make_generator(model: Any, lora: Any = None) -> Network:
    """The velocity network of config.model: net(params, x, t, text, text_mask) -> v.

    lora: config.lora, for a network with adapters.
    """
    net = _generator(family_of(model), model_config(model), _fp8_of(model), _adapters_of(lora))
    return dataclasses.replace(net, attention=attention_of(model))


def discriminator_taps(model: Any, discriminator: Any) -> tuple[int, ...]:
    """The blocks D's heads look at: discriminator.taps, or the paper's fractions of the depth."""
    return tuple(discriminator["taps"]) or default_taps(model["depth"])


def make_discriminator(model: Any, discriminator: Any, lora: Any = None) -> Network:
    """The discriminator of both sections: net(params, x, t, text, text_mask) -> logits [B].

    lora: config.lora, for a backbone with adapters, if it asks for them.
    """
    taps = discriminator_taps(model, discriminator)
    config = dataclasses.replace(model_config(model), depth=taps[-1])
    net = _discriminator(family_of(model), config, _fp8_of(discriminator),
                         _adapters_of(lora if lora and lora["discriminator"] else None), taps,
                         discriminator["heads"] or config.heads)
    return dataclasses.replace(net, attention=attention_of(model))
