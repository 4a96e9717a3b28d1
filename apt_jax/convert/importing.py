"""A diffusers folder -> a component folder of ours.

    config.json     {"kind": "pipeline", "family", "source", "components"}
    transformer/    our weights and config.json {"kind": "generator", "model", "tensor_dtypes"}
    vae/ ...        likewise, for the components that run here
    source/         the other files of the diffusers folder (links where the disk allows): what an
                    export puts beside its new transformer

Everything is checked before anything is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apt_jax.convert import engine
from apt_jax.convert.families import (
    Component,
    Family,
    components_of,
    family_of_pipeline,
    family_of_transformer,
)
from apt_jax.convert.folders import bring, new_folder
from apt_jax.convert.lora import FILE as LORA_FILE
from apt_jax.convert.lora import Merged, read_lora
from apt_jax.convert.scheduler import SCHEDULER_FILE
from apt_jax.convert.source import (
    CONFIG,
    INDEX,
    Source,
    check_weights,
    files_of,
    licence_of,
    locate,
    sha256,
)
from apt_jax.errors import UserError
from apt_jax.paths import given_path
from apt_jax.tensor_files import (
    TensorSet,
    open_folder,
    read_json,
    read_table,
    write_files,
    write_json,
)
from apt_jax.weights import KIND

PIPELINE = "pipeline"
TRANSFORMER, SOURCE = "transformer", "source"


@dataclasses.dataclass
class _Work:
    """One component to convert."""

    name: str
    component: Component
    config: dict[str, Any]  # of the model, ours
    plan: Any
    tensors: TensorSet | Merged


def import_folder(source: str, to: str | Path, *, revision: str | None = None,
                  overwrite: bool = False, copy: bool = False, lora: str | None = None,
                  lora_scale: float = 1.0, say: Callable[[str], None] = lambda text: None
                  ) -> Path:
    """Converts a diffusers folder (or the hub's) into a component folder.

    Args:
      source: a local folder or a hub id: a pipeline, or a transformer alone.
      to: the folder to write; it must not hold anything unless `overwrite`.
      copy: copy the other files instead of linking them.
      lora: a LoRA file in diffusers' format to merge into the transformer, `lora_scale` times.
      say: takes lines of progress.

    Returns:
      `to`.

    Raises:
      UserError: no such source, an unsupported or damaged checkpoint, a full disk. Nothing is left.
    """
    source, to = given_path("source", source), given_path("to", to)
    lora = given_path("lora", lora) if lora else None
    found = locate(source, revision)
    family, folders = _family(found)
    works: list[_Work] = []
    try:
        for name, component in components_of(family).items():
            if name in folders:
                works.append(_open(name, component, folders[name]))
        extra = _merge(works[0], lora, lora_scale) if lora else {}
        needs = sum(t.nbytes for w in works for t in w.tensors.tensors.values())
        with new_folder(to, overwrite, (source, lora), needs) as part:
            files = _write(part, found, family, works, folders, copy, say)
            write_json(part / CONFIG, {
                "kind": PIPELINE, "family": family.name,
                "source": {**found.origin, "licence": licence_of(found.folder), "files": files,
                           **extra},
                "components": _components(part, folders),
                "sample": _sample(family, folders),
            })
    finally:
        for work in works:
            work.tensors.__exit__()
    return Path(to)


def _family(found: Source) -> tuple[Family, dict[str, Path]]:
    """The family, and the folder of every component of the source."""
    folder = found.folder
    if (folder / INDEX).is_file():
        index = read_table(folder / INDEX)
        family = family_of_pipeline(index.get("_class_name"), str(folder / INDEX))
        folders = {}
        for name, entry in index.items():
            if not isinstance(entry, list) or entry == [None, None]:
                _check_switch(name, entry, folder / INDEX)
                continue
            if name not in family.parts:
                raise UserError(f"{folder / INDEX} has a component {name}, which {family.pipeline} "
                                "has only in other versions; this pipeline cannot be converted")
            if not (folder / name).is_dir():
                raise UserError(f"{folder} lacks the folder {name}, which {INDEX} names; copy or "
                                "download it")
            folders[name] = folder / name
        for name in family.parts:
            if name not in folders:
                raise UserError(f"{folder / INDEX} names no {name}; copy the file again")
            _check_class(folder, name, index[name])
        family.check_tokenizer(folders["tokenizer"])
        check_weights(folder, folders)
        return family, folders
    if (folder / CONFIG).is_file():
        config = read_table(folder / CONFIG)
        return (family_of_transformer(config.get("_class_name"), str(folder / CONFIG)),
                {TRANSFORMER: folder})
    raise UserError(f"{folder} has neither {INDEX} nor {CONFIG}; give a diffusers folder")


def _check_switch(name: str, value: Any, source: Path) -> None:
    """The pipeline's own settings; those of Wan 2.2 make it another sampler."""
    if name in ("boundary_ratio", "expand_timesteps") and value not in (None, False):
        raise UserError(f"{source}: {name} = {value!r} is of a pipeline with two transformers or "
                        "times per token; only Wan 2.1 text-to-video can be converted")


def _check_class(folder: Path, name: str, entry: list[Any]) -> None:
    """The index's class of a component is that of the component's own config, where it has one."""
    if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        raise UserError(f"{folder / INDEX}: {name} = {entry!r} is no library and class; copy the "
                        "file again")
    file = folder / name / CONFIG
    found = read_table(file).get("_class_name") if file.is_file() else None
    if found is not None and found != entry[1]:
        raise UserError(f"{folder / INDEX} says that {name} is {entry[1]}, {file} {found}; take "
                        "the files of one checkpoint")


def _open(name: str, component: Component, folder: Path) -> _Work:
    config = component.config_from_theirs(read_json(folder / CONFIG), str(folder / CONFIG))
    tensors = open_folder(folder, component.stem)
    try:
        plan = component.plan(config).choosing(tensors.tensors)
        engine.check_source(plan, tensors, str(folder))
    except BaseException:
        tensors.__exit__()
        raise
    if component.kind == KIND:
        # Sampling computes as the weights are stored; a training config says for itself.
        usual = engine.record_dtypes(tensors)[engine.DEFAULT]
        config |= {"dtype": "float32" if usual in ("F32", "F64") else "bfloat16", "remat": "none"}
    return _Work(name, component, config, plan, tensors)


def _merge(work: _Work, lora: str, strength: float) -> dict[str, Any]:
    """Puts a LoRA into the transformer; what config.json says of it."""
    if work.name != TRANSFORMER:
        raise UserError("--lora changes the transformer, and the source has none")
    file = Path(lora) / LORA_FILE if Path(lora).is_dir() else Path(lora)
    work.tensors = Merged(work.tensors, read_lora(file, work.plan), strength)
    return {"lora": {"file": str(lora), "sha256": sha256(file), "scale": strength}}


def _write(part: Path, found: Source, family: Family, works: list[_Work],
           folders: dict[str, Path], copy: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Converted weights and linked files; returns what is known of the source's files."""
    files = {}
    for work in works:
        bytes_ = sum(t.nbytes for t in work.tensors.tensors.values())
        say(f"{work.name}: {len(work.tensors.tensors)} tensors, {bytes_ / 1e9:.2f} GB")
        target = part / work.name
        target.mkdir()
        write_files(target, "model", engine.our_specs(work.plan, work.tensors),
                    engine.our_chunks(work.plan, work.tensors), metadata={"format": "apt_jax"})
        write_json(target / CONFIG, {
            "kind": work.component.kind, work.component.section: work.config,
            "tensor_dtypes": engine.record_dtypes(work.tensors)})
        for file in work.tensors.files:
            relative = str(file.relative_to(found.folder))
            files[relative] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    if TRANSFORMER in folders and len(folders) == 1:
        (part / SOURCE / TRANSFORMER).mkdir(parents=True)
        bring(found.folder / CONFIG, part / SOURCE / TRANSFORMER / CONFIG, copy)
        return files
    if "tokenizer" in folders:
        for relative in files_of(folders["tokenizer"]):
            bring(folders["tokenizer"] / relative, part / "tokenizer" / relative, copy)
    weights = {Path(name) for name in files if Path(name).parts[0] == TRANSFORMER}
    for relative in files_of(found.folder):
        if relative in weights or relative.name.endswith((".bin", ".ckpt", ".pt", ".msgpack")):
            continue
        if relative.parts[0] == TRANSFORMER and relative.name.endswith(".index.json"):
            continue
        if len(relative.parts) > 1 and relative.parts[0] not in folders:
            continue  # examples, assets
        bring(found.folder / relative, part / SOURCE / relative, copy)
    return files


def _sample(family: Family, folders: dict[str, Path]) -> dict[str, float]:
    """Defaults of the many-step sampler; a fixed shift of the source's own scheduler is taken."""
    settings = dict(family.sample)
    file = folders["scheduler"] / SCHEDULER_FILE if "scheduler" in folders else None
    if file is not None and file.is_file():
        shift = read_table(file).get("flow_shift")
        if type(shift) in (int, float) and 0 < shift < math.inf:
            settings["shift"] = float(shift)
    return settings


def _components(part: Path, folders: dict[str, Path]) -> dict[str, str]:
    """{component: its folder inside ours}: converted ones, the rest under source/."""
    return {name: name if (part / name).is_dir() else f"{SOURCE}/{name}" for name in folders}
