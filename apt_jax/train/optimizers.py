"""Optimisers: RMSProp as the paper used it, AdamW for the stages before, and D's backbone modes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from apt_jax.errors import UserError
from apt_jax.parallel.sharding import path_string

HEADS, BACKBONE = "head", "backbone"

# The discriminator's parameters that the diffusion network has too lie under this key.
BACKBONE_KEY = "backbone"


def part_of_discriminator(path: tuple[Any, ...]) -> str:
    """`BACKBONE` or `HEADS` for the key path of one discriminator parameter."""
    return BACKBONE if path_string(path).split("/")[0] == BACKBONE_KEY else HEADS


def discriminator_labels(params: Any) -> Any:
    """The tree of `part_of_discriminator` labels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: part_of_discriminator(path), params)


def stop_frozen(params: Any) -> Any:
    """D's parameters with the gradient stopped at the backbone (backbone "frozen", App. F).

    Only for the discriminator step: the generator's gradient flows through inputs, not parameters.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p if part_of_discriminator(path) == HEADS else jax.lax.stop_gradient(p),
        params)


def is_constant(config: Any) -> bool:
    """Whether the learning rate is the same in every update; optax counts no updates then."""
    return not config.optimizer.warmup_steps and config.optimizer.final_rate == 1


def _schedule(config: Any, rate: float) -> Any:
    """rate, or a function of the update: linear warm-up, linear fall to final_rate times rate."""
    warmup, final = int(config.optimizer.warmup_steps), float(config.optimizer.final_rate)
    if is_constant(config):
        return rate

    def schedule(count):
        up = jnp.minimum(1.0, (count + 1) / warmup) if warmup else 1.0
        return rate * up * (1.0 - (1.0 - final) * count / max(1, config.train.steps - 1))

    return schedule


def _rule(config: Any, rate: float) -> optax.GradientTransformation:
    optimizer, schedule = config.optimizer, _schedule(config, rate)
    if optimizer.name == "rmsprop":
        # Equals torch.optim.RMSprop: epsilon is added to the root, not under it. No momentum, no
        # bias correction, so the first update is lr / sqrt(1 - decay) = 3.16 lr. No clipping.
        return optax.rmsprop(schedule, decay=optimizer.decay, eps=optimizer.eps, eps_in_sqrt=False)
    if optimizer.name == "adamw":
        return optax.adamw(schedule, b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps,
                           weight_decay=optimizer.weight_decay)
    raise UserError(f"optimizer.name = {optimizer.name!r} is unknown; use 'rmsprop' or 'adamw'")


def generator_optimizer(config: Any) -> optax.GradientTransformation:
    """The optimiser of the generator (in every stage)."""
    return _rule(config, config.optimizer.learning_rate)


def discriminator_optimizer(config: Any) -> optax.GradientTransformation:
    """D's optimiser: heads at the full rate, the backbone trained, frozen or at its own rate."""
    rate = config.optimizer.discriminator_learning_rate or config.optimizer.learning_rate
    mode = config.discriminator.backbone
    if mode == "train":
        return _rule(config, rate)
    if mode == "frozen":
        backbone = optax.set_to_zero()
    elif mode == "rate":
        backbone = _rule(config, rate * config.discriminator.backbone_rate)
    else:
        raise UserError(f"discriminator.backbone = {mode!r} is unknown; "
                        "use 'train', 'frozen' or 'rate'")
    return optax.multi_transform({HEADS: _rule(config, rate), BACKBONE: backbone},
                                 discriminator_labels)
