"""An adapted run -> a folder that pipe.load_lora_weights reads."""

from __future__ import annotations

from pathlib import Path

from apt_jax.convert.card import lora_card
from apt_jax.convert.families import family_of_model, transformer_plan
from apt_jax.convert.folders import new_folder
from apt_jax.convert.lora import write_lora
from apt_jax.convert.provenance import check_found, history
from apt_jax.convert.source import CONFIG
from apt_jax.errors import UserError
from apt_jax.models.presets import adapter_scale
from apt_jax.paths import given_path
from apt_jax.tensor_files import read_table
from apt_jax.weights import flatten, load_adapters


def export_adapters(checkpoint: str, to: str | Path, *, weights: str = "ema",
                    overwrite: bool = False, command: str = "") -> Path:
    """Writes the adapters of a run alone, with a README.md.

    They fit the weights that the run's adapters lie on, so these must be the imported base itself:
    UserError where another stage's weights lie between, or where that cannot be seen because a
    stage is not here.
    """
    checkpoint, to = given_path("checkpoint", checkpoint), given_path("to", to)
    config, adapters = load_adapters(checkpoint, weights)
    past = history(checkpoint)
    check_found(past, checkpoint)
    for stage in past.stages:
        if not stage.get("lora") or not stage.lora.rank or any(
                stage.lora[key] != config.lora[key] for key in ("rank", "alpha")):
            raise UserError(f"the adapters of {checkpoint} lie on the weights of another stage "
                            f"({stage.name}), not on the imported base; export the merged "
                            "pipeline, without --adapters")
    base = read_table(past.base / CONFIG)["source"] if past.base else {}
    family = family_of_model(config.model)
    with new_folder(to, overwrite, (checkpoint, past.base)) as part:
        write_lora(part, transformer_plan(config.model), flatten(adapters),
                   adapter_scale(config.lora))
        (part / "README.md").write_text(lora_card(
            Path(to).resolve().name, family, base=base, past=past, weights=weights,
            command=command), encoding="utf-8")
    return Path(to)
