"""Configs of the repository with networks small enough for a test of the benches."""

from apt_jax.config import load_config

SMALL = ["--config.model.depth=1", "--config.model.width=32", "--config.model.heads=2",
         "--config.model.head_dim=16", "--config.model.rope_axes=4,6,6",
         "--config.model.text_width=24", "--config.discriminator.taps=1,",
         "--config.discriminator.heads=2", "--config.mesh.fsdp=1", "--config.mesh.replica=1",
         "--config.data.max_text_tokens=4", "--config.data.height=4", "--config.data.width=4"]


def small(name: str, *overrides: str):
    return load_config(f"configs/{name}.py", [*SMALL, *overrides])
