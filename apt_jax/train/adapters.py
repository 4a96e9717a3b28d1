"""Training low-rank adapters: what of a network trains, what lies frozen beside it.

With config.lora the state holds only what trains: of the generator its adapters, of the
discriminator (where asked) its adapters, heads and logit. The rest is the base; it lies among the
frozen inputs, in the dtype it is computed in, and has no average and no optimiser state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.models.discriminator import discriminator_from_diffusion
from apt_jax.models.presets import make_discriminator
from apt_jax.nn.lora import is_adapter, join, outside_backbone_or_adapter, split
from apt_jax.weights import adapted_run, base_of_adapters, load_adapters

BASE = "{}_base"  # the frozen entry that holds the base of a network
GENERATOR, DISCRIMINATOR = "generator", "discriminator"


def trains_adapters(config: Any, name: str) -> bool:
    """Whether only a part of the network `name` trains."""
    return bool(config.lora.rank) and (name == GENERATOR or config.lora.discriminator)


def parts(config: Any, name: str, params: Any) -> tuple[Any, Any]:
    """(what trains, the base) of a network's parameters; the base is {} where all trains."""
    if not trains_adapters(config, name):
        return params, {}
    return split(params, is_adapter if name == GENERATOR else outside_backbone_or_adapter)


def start_source(config: Any) -> tuple[str, str]:
    """(path, "ema" or "raw") of the weights that the generator starts from; "" is from scratch.

    In the consistency stage the student starts as its teacher, where init.generator is empty.
    """
    if config.stage == "consistency" and not config.init.generator:
        return config.init.diffusion, "ema"
    return config.init.generator, config.init.generator_weights


def init_trained(config: Any, setup: Any, name: str, key: jax.Array) -> Any:
    """What trains, at step 0: new adapters (and heads), or an adapted run's to go on with."""
    source, which = start_source(config)
    if name == GENERATOR and adapted_run(source, config.lora) is not None:
        return jax.tree.map(jax.device_put, load_adapters(source, which)[1],
                            setup.shardings[GENERATOR])
    net = getattr(setup, name)
    # The base of this random network is never computed: nothing asks for it.
    return jax.jit(lambda key: parts(config, name, net.init(key))[0],
                   out_shardings=setup.shardings[name])(key)


def frozen_bases(config: Any, setup: Any, load: Any) -> dict[str, Any]:
    """The frozen entries of an adapted run's bases.

    Args:
      load: (path, which) -> whole parameters of a generator without adapters, on the mesh.
    """
    frozen = {}
    if trains_adapters(config, GENERATOR):
        base = load(*base_of_adapters(*start_source(config), config.lora))
        frozen[BASE.format(GENERATOR)] = _in_compute_dtype(setup.generator, base)
    if setup.discriminator is not None and trains_adapters(config, DISCRIMINATOR):
        plain = make_discriminator(config.model, config.discriminator)
        where = jax.tree.map(lambda leaf: leaf.sharding, setup.bases[BASE.format(DISCRIMINATOR)])
        take = jax.jit(lambda diffusion: {"backbone": discriminator_from_diffusion(
            diffusion, plain, jax.random.key(0))["backbone"]}, out_shardings=where)
        base = take(load(config.init.diffusion, "ema"))
        frozen[BASE.format(DISCRIMINATOR)] = _in_compute_dtype(setup.discriminator, base)
    return frozen


def as_adapted(config: Any, setup: Any, params: Any) -> Any:
    """Whole parameters as those of the adapted network: adapters that change nothing."""
    if not trains_adapters(config, GENERATOR):
        return params
    nothing = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                                           setup.abstract[GENERATOR]),
                      out_shardings=setup.shardings[GENERATOR])()
    return join(params, nothing)


def _in_compute_dtype(net: Any, base: Any) -> Any:
    return jax.tree.map(lambda new, old: old if new is old else jax.device_put(new, old.sharding),
                        net.compute_copy(base), base)
