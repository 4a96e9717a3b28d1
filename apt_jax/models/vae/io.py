"""A VAE on disk: a folder with model.safetensors and config.json {"kind": "vae", "vae": {...}}.

The same layout as a generator's weights folder; parameters have flat names such as
"decoder/conv_in/kernel".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from apt_jax.errors import UserError
from apt_jax.models.vae.config import VAEConfig
from apt_jax.models.vae.model import VAE, make_vae
from apt_jax.nn.functional import Params
from apt_jax.tensor_files import Spec, open_folder, read_json, write_files, write_json

KIND, CONFIG_FILE, PART = "vae", "config.json", "vae"


def save_vae(folder: str | Path, config: VAEConfig, params: Params,
             card: Mapping[str, Any] | None = None, *, bfloat16: bool = False) -> Path:
    """Writes a VAE folder, which must not hold one yet.

    Args:
      folder: made if it does not exist.
      params: nested dict of arrays, checked against the config.
      card: further entries of config.json (where the weights come from, their licence).
      bfloat16: store half the size.

    Returns the folder. UserError for parameters that do not fit, or a folder already in use.
    """
    folder = Path(folder)
    flat = flat_names(params)
    _check(flat, config, "the VAE's parameters")
    if (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} already holds {CONFIG_FILE}; remove it or write elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(ml_dtypes.bfloat16 if bfloat16 else np.float32)
    write_files(folder, "model", [Spec(name, dtype, tuple(v.shape)) for name, v in flat.items()],
                (np.asarray(value).astype(dtype) for value in flat.values()),
                metadata={"format": "apt_jax"})
    write_json(folder / CONFIG_FILE, {**(card or {}), "kind": KIND, "vae": config.to_dict()})
    return folder


def load_vae(path: str | Path, dtype: str | None = None) -> tuple[VAE, Params]:
    """Reads a VAE.

    Args:
      path: a VAE folder, or a component folder (with vae/ in it) as `convert import` writes it.
      dtype: compute dtype, "float32" or "bfloat16"; None for the one in its config.

    Returns the VAE and its parameters, a nested dict of float32 numpy arrays.
    UserError for a folder that is not there, damaged, or of another model.
    """
    folder = Path(path)
    if (folder / PART / CONFIG_FILE).is_file():
        folder = folder / PART
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a VAE folder, or one that "
                        "'apt-jax convert import' wrote")
    card = read_json(folder / CONFIG_FILE)
    if not isinstance(card, dict) or card.get("kind") != KIND or not isinstance(
            card.get("vae"), dict):
        kind = card.get("kind") if isinstance(card, dict) else None
        raise UserError(f"{folder / CONFIG_FILE} does not describe a VAE (kind = {kind!r}); give "
                        "a folder that 'apt-jax convert import' wrote")
    config = VAEConfig.from_dict(card["vae"])
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    with open_folder(folder) as tensors:
        _check(tensors.tensors, config, str(folder))
        flat = {name: tensors.read(name).astype(np.float32) for name in tensors.tensors}
    params: Params = {}
    for name, value in flat.items():
        *groups, leaf = name.split("/")
        node = params
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return make_vae(config), params


def flat_names(params: Params) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, keys sorted."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check(flat: Mapping[str, Any], config: VAEConfig, source: str) -> None:
    """Missing, unknown and misshapen parameters, by name."""
    want = {k: tuple(v.shape) for k, v in flat_names(make_vae(config).abstract()).items()}
    for problem, names in (("lacks", want.keys() - flat.keys()),
                           ("has the unknown", flat.keys() - want.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source}: it {problem} parameter {min(names)!r}{more} for its "
                            "config; import it again")
    for name, shape in want.items():
        if tuple(flat[name].shape) != shape:
            raise UserError(f"{source}: parameter {name!r} is {tuple(flat[name].shape)}, its "
                            f"config says {shape}; import it again")
