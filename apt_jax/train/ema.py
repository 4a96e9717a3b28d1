"""Exponential moving average of the generator (decay 0.995; the paper's final weights)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def update_ema(ema: Any, params: Any, decay: float, updates: jax.Array, from_step: int = 0) -> Any:
    """One step of the average: ema <- decay * ema + (1 - decay) * params.

    Args:
      ema, params: trees of equal structure, float32.
      decay: in [0, 1).
      updates: int32 scalar, the number of finished updates including this one.
      from_step: until this many updates the average is a copy of `params`, so that the early,
        wild weights do not linger in it.
    """
    keep = jnp.where(updates <= from_step, 0.0, decay).astype(jnp.float32)
    return jax.tree.map(lambda e, p: keep * e + (1.0 - keep) * p, ema, params)
