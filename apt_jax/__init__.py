"""apt_jax: one-step text-to-image and text-to-video by adversarial post-training, in JAX.

The names below are all that a notebook needs; each is imported on first use, so that
`import apt_jax` stays quick and touches no device.

    import apt_jax
    generator = apt_jax.load("bundled:base")
    samples = generator.sample(["red heart", "cat face"], mode="one_step", seed=0)
    apt_jax.show(samples)
    apt_jax.save(samples, "runs/pictures")
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> the module that holds it
_PUBLIC = {
    "load": "apt_jax.api",
    "show": "apt_jax.samples",
    "save": "apt_jax.samples",
    "Generator": "apt_jax.api",
    "Samples": "apt_jax.samples",
    "UserError": "apt_jax.errors",
    "base_config": "apt_jax.config",
    "load_config": "apt_jax.config",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'apt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
