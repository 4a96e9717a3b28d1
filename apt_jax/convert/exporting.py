"""Our weights -> a diffusers folder that from_pretrained loads.

A run (or a component folder) becomes a whole pipeline: the new transformer, the scheduler that
makes one step z - v(z, c, T), and every other component of the base, linked or copied. Weights
without a base become the transformer alone; the shared modulation, which no public class has, comes
with a PyTorch module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from apt_jax.config import base_config
from apt_jax.convert import engine
from apt_jax.convert.card import model_card
from apt_jax.convert.families import DIFFUSERS, Family, family_of_model, transformer_plan
from apt_jax.convert.folders import bring, new_folder
from apt_jax.convert.provenance import History, check_found, component_folder, history
from apt_jax.convert.scheduler import CLASS as SCHEDULER
from apt_jax.convert.scheduler import SCHEDULER_FILE, scheduler_config
from apt_jax.convert.source import CONFIG, INDEX, check_weights, files_of
from apt_jax.errors import UserError, disk_errors
from apt_jax.installed import notice
from apt_jax.models import minilm
from apt_jax.paths import given_path
from apt_jax.tensor_files import SHARD_BYTES, read_table, write_files, write_json
from apt_jax.weights import TRANSFORMER, generator_card, open_generator

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TORCH_MODULE = "mmdit_shared.py"


def export_folder(checkpoint: str, to: str | Path, *, weights: str = "ema",
                  base: str | None = None, dtype: str = "source",
                  two_step_time: float | None = None, shard_bytes: int = SHARD_BYTES,
                  overwrite: bool = False, copy: bool = False, command: str = "",
                  say: Callable[[str], None] = lambda text: None) -> Path:
    """Writes a diffusers folder.

    Args:
      checkpoint: a run folder, a component folder, or a weights folder.
      to: the folder to write; it must not hold anything unless `overwrite`.
      weights: "ema" or "raw", of a run.
      base: the component folder of the other components; None follows the run's config to it.
      dtype: "source" (as the base's tensors were), "float32", "bfloat16" or "float16".
      two_step_time: t between two steps; None takes the run's sample.two_step_time.
      shard_bytes: above so many bytes the weights are several files with an index.
      copy: copy the base's files instead of linking them.
      command: for the model card.
      say: takes lines of progress.

    Returns:
      `to`.

    Raises:
      UserError: a checkpoint that is damaged or that no public class can hold, a base that is not
      here or of another model, a full disk. Nothing is left.
    """
    checkpoint, to = given_path("checkpoint", checkpoint), given_path("to", to)
    base = given_path("base", base) if base else None
    past = history(checkpoint)
    folder = Path(base) if base else past.base
    if folder is None:
        check_found(past, checkpoint, ", or name the imported folder with --base")
    if base and component_folder(base) is None:
        raise UserError(f"--base {base} is no component folder; give one that apt-jax convert "
                        "import wrote")
    card = read_table(folder / CONFIG) if folder else {}
    start = card.get("source", {})
    if not folder and past.bundled:
        about = generator_card(past.bundled)
        start = {"bundled": past.bundled, "licence": about.get("licence", "unknown").lower()}
    settings = (past.stages[0] if past.stages else base_config()).sample
    t = settings.two_step_time if two_step_time is None else two_step_time
    with open_generator(checkpoint, weights) as (model, leaves):
        if past.stages and hasattr(leaves, "step"):  # the newest that could be read
            past = past._replace(steps=[leaves.step, *past.steps[1:]])
        shared = model.get("modulation") == "shared"
        family = family_of_model(model)
        if folder:
            _check_base(family, model, card, folder)
        scheduler = scheduler_config(family.name, t, bool(settings.two_step_fresh))
        plan, config = transformer_plan(model), family.table.config_from(model)
        engine.check_leaves(plan, leaves.shapes(), checkpoint)
        dtypes = _dtypes(dtype, folder)
        specs = engine.their_specs(plan, dtypes)
        size = sum(spec.nbytes for spec in specs)
        say(f"transformer: {len(specs)} tensors, {size / 1e9:.2f} GB")
        pipeline = bool(folder and set(card.get("components", ())) - {TRANSFORMER})
        if pipeline:
            _check_components(family, folder)
        with new_folder(to, overwrite, (checkpoint, folder), size) as part:
            if pipeline:
                _other_components(part, folder, copy)
                (part / "scheduler").mkdir()
                write_json(part / "scheduler" / SCHEDULER_FILE, scheduler)
            target = part / TRANSFORMER if pipeline else part
            target.mkdir(exist_ok=True)
            write_files(target, DIFFUSERS, specs,
                        engine.their_chunks(plan, dtypes, engine.reader_of_leaves(leaves, plan)),
                        limit=shard_bytes, metadata={"format": "pt"})
            write_json(target / CONFIG, config)
            if shared:
                source = resources.files("apt_jax") / "assets" / TORCH_MODULE
                _text(target / TORCH_MODULE, source.read_text("utf-8"))
            if start.get("bundled"):
                _text(part / "NOTICE", notice())
            _text(part / "README.md", model_card(
                Path(to).resolve().name, family, base=start, past=past,
                weights=weights, command=command, two_step_time=t, dtype=_said(dtypes),
                pipeline=pipeline, module=TORCH_MODULE if shared else "",
                text=_text_states(model, past, checkpoint)))
    return Path(to)


def _text_states(model: Mapping[str, Any], past: History, checkpoint: str) -> str:
    """Which text the network reads, where it is a pixel model of the demo's encoder: what `apt-jax
    sample` gives such a one. "" for others: their base brings its own encoder along."""
    if (model["in_channels"], model["text_width"]) != (3, minilm.WIDTH):
        return ""
    data = past.stages[0].data if past.stages else generator_card(checkpoint).get("data") or {}
    tokens = data.get("max_text_tokens")
    return (f"Text: the states of sentence-transformers/{minilm.NAME} for each token, start and end "
            f"tokens included{f', at most {tokens} of them' if tokens else ''}; padding is masked.")


def _check_base(family: Family, model: Mapping[str, Any], card: Mapping[str, Any],
                folder: Path) -> None:
    if card.get("family") != family.name:
        raise UserError(f"{folder} is of family {card.get('family')}, the checkpoint of "
                        f"{family.name}; give its own base with --base")
    with open_generator(folder) as (base, _):
        there = family.table.config_from(base)
    for key, here in family.table.config_from(model).items():
        if here != there.get(key):
            raise UserError(f"the base {folder} has {key} = {there.get(key)!r}, the checkpoint "
                            f"{here!r}; give its own base with --base")


def _check_components(family: Family, folder: Path) -> None:
    """The components that the base passes on are still whole."""
    source = folder / "source"
    index = read_table(source / INDEX)
    kept = [name for name, entry in index.items()
            if isinstance(entry, list) and name in family.parts and name != TRANSFORMER]
    for name in kept:
        if not (source / name).is_dir():
            raise UserError(f"{source} lacks the folder {name}, which {INDEX} names; import the "
                            "base again")
    family.check_tokenizer(source / "tokenizer")
    check_weights(source, kept)


def _dtypes(dtype: str, folder: Path | None) -> dict[str, str]:
    if dtype in DTYPE_NAMES:
        return {engine.DEFAULT: DTYPE_NAMES[dtype]}
    if dtype != "source":
        raise UserError(f"dtype {dtype!r} is unknown; use source, {', '.join(DTYPE_NAMES)}")
    if folder is None:
        return {engine.DEFAULT: "F32"}
    found = read_table(folder / TRANSFORMER / CONFIG).get("tensor_dtypes")
    if not isinstance(found, dict) or engine.DEFAULT not in found or any(
            kind not in ("F64", *DTYPE_NAMES.values()) for kind in found.values()):
        raise UserError(f"{folder / TRANSFORMER / CONFIG} does not say the source's dtypes; give "
                        "--dtype")
    return found


def _said(dtypes: Mapping[str, str]) -> str:
    names = {kind: name for name, kind in DTYPE_NAMES.items()}
    usual = names.get(dtypes[engine.DEFAULT], dtypes[engine.DEFAULT])
    return usual + (" (some tensors otherwise, as in the base)" if len(dtypes) > 1 else "")


def _other_components(part: Path, folder: Path, copy: bool) -> None:
    source = folder / "source"
    for relative in files_of(source, skip=(TRANSFORMER, "scheduler")):
        if relative.name in ("README.md", INDEX) and len(relative.parts) == 1:
            continue
        bring(source / relative, part / relative, copy)
    index = read_table(source / INDEX)
    index["scheduler"] = ["diffusers", SCHEDULER]
    write_json(part / INDEX, index)


def _text(path: Path, text: str) -> None:
    with disk_errors(path):
        path.write_text(text, encoding="utf-8")
