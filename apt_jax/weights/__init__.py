"""Generator weights on disk, whatever wrote them: weights folders, component folders, runs."""

from apt_jax.weights.common import (
    CHECKPOINTS,
    CONFIG_FILE,
    KIND,
    PIPELINE,
    TRANSFORMER,
    flatten,
    read_card,
    unflatten,
)
from apt_jax.weights.folders import (
    export_run,
    generator_card,
    load_component,
    load_generator,
    open_generator,
    save_generator,
)
from apt_jax.weights.runs import (
    adapted_run,
    base_of_adapters,
    init_path,
    load_adapters,
    load_discriminator,
    record_directory,
)

__all__ = [
    "CHECKPOINTS",
    "CONFIG_FILE",
    "KIND",
    "PIPELINE",
    "TRANSFORMER",
    "adapted_run",
    "base_of_adapters",
    "export_run",
    "flatten",
    "generator_card",
    "init_path",
    "load_adapters",
    "load_component",
    "load_discriminator",
    "load_generator",
    "open_generator",
    "read_card",
    "record_directory",
    "save_generator",
    "unflatten",
]
