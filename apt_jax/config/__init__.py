"""Configuration: one schema, config files that change it, overrides, checks, JSON."""

from apt_jax.config.io import config_from_json, config_to_json, load_json, save_json
from apt_jax.config.kept import load_kept
from apt_jax.config.load import apply_overrides, load_config, split_overrides
from apt_jax.config.schema import FIELDS, base_config, describe_fields
from apt_jax.config.validate import validate

__all__ = [
    "FIELDS",
    "apply_overrides",
    "base_config",
    "config_from_json",
    "config_to_json",
    "describe_fields",
    "load_config",
    "load_json",
    "load_kept",
    "save_json",
    "split_overrides",
    "validate",
]
