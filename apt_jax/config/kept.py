"""The config that a run folder keeps of itself."""

from __future__ import annotations

from pathlib import Path

import ml_collections

from apt_jax.config.io import load_json
from apt_jax.config.validate import check_kept

KEPT = ("model", "data", "sample", "init")  # what is read of a run that is not trained on


def load_kept(path: str | Path) -> ml_collections.ConfigDict:
    """A run's config.json, by this version or an older one. UserError if it is missing or damaged."""
    config = load_json(path)
    check_kept(config, KEPT, str(path))
    return config
