"""One file per loss. Every loss has the same signature and returns one value per sample:

    fn(params, frozen, batch, keys, nets, config) -> (loss [B], aux: dict of [B])

params are differentiated, everything in `frozen` is not; keys [B] holds one random key per sample, so
that neither sharding nor gradient accumulation changes a draw. The caller reduces with loss_mask.
"""

from apt_jax.objectives.types import Nets

__all__ = ["Nets"]
