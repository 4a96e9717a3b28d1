"""Generator weights on disk: a folder with model.safetensors and config.json.

model.safetensors (or several files and an index) holds flat "a/b/c" keys, config.json
{"kind": "generator", "model": {...}, ...}. The same loader reads the bundled base, the checkpoints
of a run, and a component folder, which `apt-jax convert import` writes: its config.json says
{"kind": "pipeline"} and its networks lie in transformer/, vae/ and text_encoder/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from apt_jax.config import load_kept
from apt_jax.errors import UserError
from apt_jax.parallel.place import place
from apt_jax.parallel.sharding import STACKED
from apt_jax.tensor_files import NAMES, TensorSet, open_folder
from apt_jax.weights.common import (
    BUNDLED,
    CHECKPOINTS,
    CONFIG_FILE,
    KIND,
    PIPELINE,
    TRANSFORMER,
    WEIGHTS_FILE,
    check_keys,
    flatten,
    has_weights,
    is_run,
    make_abstract,
    plain,
    read_card,
    unflatten,
)
from apt_jax.weights.runs import load_run, open_run

# files of a diffusers pipeline, or of one of its transformers
_DIFFUSERS = ("model_index.json", "diffusion_pytorch_model.safetensors",
              "diffusion_pytorch_model.safetensors.index.json")


def save_generator(folder: str | Path, model_config: Mapping[str, Any], params: Any,
                   card: Mapping[str, Any] | None = None, *, bfloat16: bool = False) -> Path:
    """Writes a weights folder, atomically file by file.

    Args:
      folder: made if it does not exist.
      model_config: config.model of the generator.
      params: its nested dict of arrays.
      card: further entries of config.json (how it was trained, on what, its licence).
      bfloat16: store float32 leaves as bfloat16, half the size; loading gives float32 again.

    Returns:
      The folder.
    """
    import ml_dtypes
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {}
    for name, value in flatten(params).items():
        value = np.asarray(value)
        if bfloat16 and value.dtype == np.float32:
            value = value.astype(ml_dtypes.bfloat16)
        flat[name] = np.ascontiguousarray(value)
    description = {**(card or {}), "kind": KIND, "model": plain(model_config)}
    _replace(folder / WEIGHTS_FILE, save(flat, metadata={"format": "apt_jax"}))
    _replace(folder / CONFIG_FILE,
             (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())
    return folder


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_bytes(data)
    os.replace(part, path)


def load_generator(path: str | Path, which: str = "ema", shardings: Any = None
                   ) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """Reads a generator.

    Args:
      path: "bundled:base", a weights folder, a component folder, or a run folder (its newest
        readable checkpoint).
      which: "ema" or "raw": which weights of a run; a weights folder holds one set.
      shardings: a tree of shardings of the parameters; each leaf is then read straight onto its
        devices, layer by layer, and the host never holds the whole.

    Returns:
      Its config.model, and the parameters as a nested dict of float32 arrays: numpy, or jax where
      `shardings` is given.

    Raises:
      UserError: nothing there, an incomplete or damaged folder, keys that do not fit the model.
    """
    if which not in ("ema", "raw"):
        raise UserError(f"weights = {which!r:.60} is unknown; use 'ema' or 'raw'")
    if not str(path).startswith(BUNDLED) and is_run(folder := generator_folder(path)):
        return load_run(folder, which, shardings)
    with open_generator(path, which) as (model, leaves):
        flat = flatten(shardings) if shardings is not None else None
        if flat is not None and set(flat) != set(leaves.shapes()):
            flat = None  # of another model: the caller compares, and names the difference
        return model, unflatten({
            name: _read_leaf(leaves, name, shape, flat and flat[name])
            for name, shape in leaves.shapes().items()})


def _read_leaf(leaves: Any, name: str, shape: tuple[int, ...], sharding: Any) -> Any:
    return place(lambda layer: leaves.read(name, layer), shape, np.float32,
                 bool(STACKED.search(name)), sharding)


@contextmanager
def open_generator(path: str | Path, which: str = "ema") -> Iterator[tuple[Any, Any]]:
    """A generator's config.model and its leaves, to be read one at a time.

    The leaves have `shapes()` -> {"a/b": shape} and `read(name, layer=None)` -> numpy array in the
    dtype it is stored in. Arguments and errors as for `load_generator`.
    """
    text = str(path)
    if text.startswith(BUNDLED):
        with _bundled(text.removeprefix(BUNDLED)) as folder, _open_folder(folder) as opened:
            yield opened
        return
    folder = generator_folder(path)
    if has_weights(folder):
        with _open_folder(folder) as opened:
            yield opened
    elif is_run(folder):
        yield open_run(folder, which)
    elif any((folder / name).is_file() for name in _DIFFUSERS):
        if (folder / CONFIG_FILE).is_file() and (
                read_card(folder).get("_class_name") == "MMDiTShared"):
            raise UserError(f"{folder} is an export for PyTorch alone (MMDiTShared); give the run or "
                            "the weights folder that it was made of")
        raise UserError(f"{folder} is a diffusers folder; apt-jax convert import makes one that "
                        "can be read here")
    else:
        raise UserError(f"{folder} holds neither {WEIGHTS_FILE} nor {CHECKPOINTS}/; give a run "
                        "folder that has saved a checkpoint, or a weights folder")


def generator_folder(path: str | Path) -> Path:
    """The folder of the generator itself: transformer/ of a component folder, else `path`."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run folder, a weights folder or "
                        "'bundled:base'")
    if not has_weights(folder) and not is_run(folder) and (
            (folder / CONFIG_FILE).is_file() and read_card(folder).get("kind") == PIPELINE):
        return folder / TRANSFORMER
    return folder


def load_component(path: str | Path, name: str, kind: str, shardings: Any = None
                   ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Another network of a component folder: the VAE or the text encoder.

    Args:
      path: the component folder, or the network's own folder in it.
      name, kind: "vae" and "vae", or "text_encoder" and "umt5".
      shardings: as for `load_generator`.

    Returns:
      Its config.json, and its parameters as a nested dict of float32 arrays.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; apt-jax convert import writes one")
    if (folder / name / CONFIG_FILE).is_file():
        folder = folder / name
    card = read_card(folder)
    if card.get("kind") != kind or not isinstance(card.get(kind), dict):
        raise UserError(f"{folder / CONFIG_FILE} does not describe a {name} (kind = "
                        f"{card.get('kind')!r}); give a folder that apt-jax convert import wrote")
    flat = flatten(shardings) if shardings is not None else None
    with open_folder(folder) as tensors:
        return card, unflatten({key: _read_leaf(tensors, key, shape, flat and flat[key])
                                for key, shape in tensors.shapes().items()})


def generator_card(path: str | Path) -> dict[str, Any]:
    """What a weights folder (or bundled weights) says of itself; {} for a run, without card."""
    text = str(path)
    if text.startswith(BUNDLED):
        folder = resources.files("apt_jax") / "assets" / text.removeprefix(BUNDLED)
    else:
        folder = Path(path).expanduser()
        folder = generator_folder(folder) if folder.is_dir() else folder
    return read_card(folder) if has_weights(folder) else {}


@contextmanager
def _bundled(name: str) -> Iterator[Path]:
    root = resources.files("apt_jax") / "assets" / name
    if not (root / WEIGHTS_FILE).is_file():
        raise UserError(f"there are no bundled weights {BUNDLED}{name}; the package ships "
                        f"{BUNDLED}base")
    with resources.as_file(root) as folder:
        yield Path(folder)


@contextmanager
def _open_folder(folder: Path) -> Iterator[tuple[ml_collections.ConfigDict, TensorSet]]:
    description = read_card(folder)
    if description.get("kind") != KIND or not isinstance(description.get("model"), dict):
        raise UserError(f"{folder / CONFIG_FILE} does not describe a generator (kind = "
                        f"{description.get('kind')!r}); give a folder that export wrote")
    model = ml_collections.ConfigDict(
        {key: tuple(value) if isinstance(value, list) else value
         for key, value in description["model"].items()})
    try:
        abstract = make_abstract(model)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} describes no network that can be built ({error}); "
                        "export it again") from error
    with open_folder(folder) as tensors:
        for name, tensor in tensors.tensors.items():
            if NAMES[tensor.dtype] not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{tensor.file}: {name} has dtype {NAMES[tensor.dtype]}; generator "
                                "weights are floating point")
        check_keys(tensors.shapes(), abstract, str(folder))
        yield model, tensors


def export_run(run: str | Path, folder: str | Path, *, which: str = "ema", bfloat16: bool = False,
               card: Mapping[str, Any] | None = None) -> Path:
    """Writes the newest generator of a run as a weights folder (this made the bundled base).

    The card also says what the run's config says of data and sampling, so that a sampler finds
    its defaults there.
    """
    model, params = load_generator(run, which)
    config = load_kept(Path(run) / CONFIG_FILE)
    described = {"weights": which, "stage": config.stage, "data": plain(config.data),
                 "sample": plain(config.sample), **(card or {})}
    return save_generator(folder, model, params, described, bfloat16=bfloat16)
