"""The pipelines that can be converted, and the plan of every component."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from apt_jax.convert.table import Plan, make_plan
from apt_jax.convert.tables import qwen_image, umt5, vae, wan
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.models.umt5 import make_umt5, umt5_config
from apt_jax.models.vae.config import VAEConfig
from apt_jax.models.vae.model import make_vae
from apt_jax.tensor_files import read_table
from apt_jax.weights import KIND, flatten

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # how the libraries name weight files


@dataclasses.dataclass(frozen=True)
class Component:
    """A network of a pipeline that is converted.

    kind, section: what its config.json here says: {"kind": kind, section: {...}}.
    stem: the name of its weight files there.
    config_from_theirs: (their config.json, its path) -> our config, plain values.
    plan: our config -> the table applied.
    """

    kind: str
    section: str
    stem: str
    config_from_theirs: Callable[[Mapping[str, Any], str], dict[str, Any]]
    plan: Callable[[Mapping[str, Any]], Plan]


@dataclasses.dataclass(frozen=True)
class Family:
    """A pipeline of diffusers.

    name: as config.json of a component folder says; pipeline: diffusers' class;
    model_family: config.model.family; table: the transformer's module in tables/;
    parts: the entries of model_index.json; tokenizer: groups of files of which the tokenizer's
    folder must have one; task: the hub's name of what the pipeline does; sample: how its many-step
    sampler is usually run, as fields of config.sample.
    """

    name: str
    pipeline: str
    model_family: str
    table: ModuleType
    tokenizer: tuple[tuple[str, ...], ...]
    task: str
    sample: Mapping[str, float]
    parts: tuple[str, ...] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    def check_tokenizer(self, folder: Path) -> None:
        """UserError when a file of the tokenizer is not there, or is no JSON."""
        for group in self.tokenizer:
            if all((folder / name).is_file() for name in group):
                break
        else:
            files = " or ".join(" and ".join(group) for group in self.tokenizer)
            raise UserError(f"{folder} lacks {files}; copy or download the tokenizer")
        for name in group:
            if name.endswith(".json"):
                read_table(folder / name)


FAMILIES = (
    Family("wan", "WanPipeline", "wan", wan, (("tokenizer.json",),), "text-to-video",
           {"guidance": 5.0, "steps": 50, "shift": 3.0}),
    # Its shift grows with the picture; this is that of 1024 x 1024.
    Family("qwen_image", "QwenImagePipeline", "mmdit", qwen_image,
           (("tokenizer.json",), ("vocab.json", "merges.txt")), "text-to-image",
           {"guidance": 4.0, "steps": 50, "shift": 2.0}),
)


def family_of_pipeline(class_name: Any, source: str) -> Family:
    """By model_index.json's _class_name."""
    for family in FAMILIES:
        if class_name == family.pipeline:
            return family
    known = " and ".join(f.pipeline for f in FAMILIES)
    raise UserError(f"{source} is of {class_name or 'no pipeline'}; {known} can be converted")


def family_of_transformer(class_name: Any, source: str) -> Family:
    """By transformer/config.json's _class_name."""
    for family in FAMILIES:
        if class_name == family.table.CLASS:
            return family
    if class_name == qwen_image.SHARED_CLASS:  # what convert export makes of a network that has no pipeline
        raise UserError(f"{source} is an export for PyTorch alone ({class_name}); give the run or the "
                        "weights folder that it was made of to the command that should read it")
    known = " and ".join(f.table.CLASS for f in FAMILIES)
    raise UserError(f"{source} describes {class_name or 'no model'}; {known} can be converted")


def family_of_model(model: Mapping[str, Any]) -> Family:
    """By config.model.family."""
    name = model.get("family", "mmdit")
    return next(family for family in FAMILIES if family.model_family == name)


def transformer_plan(model: Mapping[str, Any]) -> Plan:
    """The plan of config.model's generator."""
    return make_plan(family_of_model(model).table.rules(model),
                     _shapes(make_generator(model).abstract()))


def _shapes(abstract: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flatten(abstract).items()}


def vae_plan(config: Mapping[str, Any]) -> Plan:
    """The plan of a VAE; config: the fields of VAEConfig."""
    network = make_vae(VAEConfig.from_dict(config))
    return make_plan(vae.rules(config), _shapes(network.abstract()))


def umt5_plan(config: Mapping[str, Any]) -> Plan:
    """The plan of a UMT5 encoder; config: the fields of UMT5Config."""
    return make_plan(umt5.rules(config), _shapes(make_umt5(umt5_config(config)).abstract()),
                     umt5.ALIASES)


VAE = Component("vae", "vae", DIFFUSERS, vae.config_from_theirs, vae_plan)
UMT5 = Component("umt5", "umt5", TRANSFORMERS, umt5.config_from_theirs, umt5_plan)


def components_of(family: Family) -> dict[str, Component]:
    """The networks of a family's pipeline that are converted, by folder name.

    Qwen-Image's text encoder is not: transformers runs it, from source/.
    """
    transformer = Component(KIND, "model", DIFFUSERS, family.table.model_from, transformer_plan)
    found = {"transformer": transformer, "vae": VAE}
    return found | {"text_encoder": UMT5} if family.name == "wan" else found
