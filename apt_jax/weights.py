"""Generator weights on disk: a folder with model.safetensors and config.json.

model.safetensors (or several files and an index) holds flat "a/b/c" keys, config.json
{"kind": "generator", "model": {...}, ...}. The same loader reads the bundled base, the checkpoints
of a run, and a component folder, which `apt-jax convert import` writes: its config.json says
{"kind": "pipeline"} and its networks lie in transformer/, vae/ and text_encoder/.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from apt_jax.config import load_json
from apt_jax.errors import UserError
from apt_jax.parallel.place import place
from apt_jax.parallel.sharding import STACKED
from apt_jax.tensor_files import NAMES, TensorSet, open_folder

BUNDLED = "bundled:"
WEIGHTS_FILE, CONFIG_FILE, CHECKPOINTS = "model.safetensors", "config.json", "checkpoints"
INDEX_FILE = "model.safetensors.index.json"
KIND, PIPELINE, TRANSFORMER = "generator", "pipeline", "transformer"


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, keys sorted."""
    flat: dict[str, Any] = {}
    for key in sorted(params):
        value = params[key]
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    params: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split("/")
        node = params
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return params


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
    description = {**(card or {}), "kind": KIND, "model": _plain(model_config)}
    _replace(folder / WEIGHTS_FILE, save(flat, metadata={"format": "apt_jax"}))
    _replace(folder / CONFIG_FILE,
             (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())
    return folder


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in dict(section).items()}


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
        raise UserError(f"which = {which!r} is unknown; use 'ema' or 'raw'")
    if not str(path).startswith(BUNDLED) and _is_run(folder := generator_folder(path)):
        return _load_run(folder, which, shardings)
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
    dtype it is stored in; those of a run are read at once. Arguments and errors as for
    `load_generator`.
    """
    text = str(path)
    if text.startswith(BUNDLED):
        with _bundled(text.removeprefix(BUNDLED)) as folder, _open_folder(folder) as opened:
            yield opened
        return
    folder = generator_folder(path)
    if _has_weights(folder):
        with _open_folder(folder) as opened:
            yield opened
    elif _is_run(folder):
        model, params = load_generator(folder, which)
        yield model, Leaves(flatten(params))
    else:
        raise UserError(f"{folder} holds neither {WEIGHTS_FILE} nor {CHECKPOINTS}/; give a run "
                        "folder that has saved a checkpoint, or a weights folder")


def generator_folder(path: str | Path) -> Path:
    """The folder of the generator itself: transformer/ of a component folder, else `path`."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run folder, a weights folder or "
                        "'bundled:base'")
    if not _has_weights(folder) and not _is_run(folder) and (
            (folder / CONFIG_FILE).is_file() and read_card(folder).get("kind") == PIPELINE):
        return folder / TRANSFORMER
    return folder


class Leaves:
    """Flat parameters in memory, to be read like those of a file."""

    def __init__(self, flat: Mapping[str, Any]):
        self._flat = flat

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._flat.items()}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        return np.asarray(self._flat[name] if layer is None else self._flat[name][layer])


def _is_run(folder: Path) -> bool:
    return not _has_weights(folder) and (folder / CHECKPOINTS).is_dir()


def _has_weights(folder: Any) -> bool:
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


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
    folder = Path(path)
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
        folder = Path(path)
        folder = generator_folder(folder) if folder.is_dir() else folder
    return read_card(folder) if _has_weights(folder) else {}


@contextmanager
def _bundled(name: str) -> Iterator[Path]:
    root = resources.files("apt_jax") / "assets" / name
    if not (root / WEIGHTS_FILE).is_file():
        raise UserError(f"there are no bundled weights {BUNDLED}{name}; the package ships "
                        f"{BUNDLED}base")
    with resources.as_file(root) as folder:
        yield Path(folder)


def read_card(folder: Any) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder} has no readable {CONFIG_FILE}; copy it from where the weights "
                        "came from") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / CONFIG_FILE} is not valid JSON ({error}); copy it "
                        "again") from None


@contextmanager
def _open_folder(folder: Path) -> Iterator[tuple[ml_collections.ConfigDict, TensorSet]]:
    description = read_card(folder)
    if description.get("kind") != KIND or not isinstance(description.get("model"), dict):
        raise UserError(f"{folder / CONFIG_FILE} does not describe a generator (kind = "
                        f"{description.get('kind')!r}); give a folder that export wrote")
    model = ml_collections.ConfigDict(
        {key: tuple(value) if isinstance(value, list) else value
         for key, value in description["model"].items()})
    with open_folder(folder) as tensors:
        for name, tensor in tensors.tensors.items():
            if NAMES[tensor.dtype] not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{tensor.file}: {name} has dtype {NAMES[tensor.dtype]}; generator "
                                "weights are floating point")
        _check_keys(tensors.shapes(), make_abstract(model), str(folder))
        yield model, tensors


def make_abstract(model: Any) -> Any:
    """Shapes and dtypes of a generator's parameters."""
    from apt_jax.models.presets import make_generator

    return make_generator(model).abstract()


def _check_keys(have: Mapping[str, tuple[int, ...]], abstract: Any, source: str) -> None:
    """Missing, unknown and misshapen parameters, by name. have: {"a/b": shape}."""
    want = {k: tuple(v.shape) for k, v in flatten(abstract).items()}
    for problem, names in (("lacks", sorted(set(want) - set(have))),
                           ("has the unknown", sorted(set(have) - set(want)))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source} {problem} parameter {names[0]!r}{more} for its own "
                            f"{CONFIG_FILE}; export it again")
    for name in want:
        if want[name] != have[name]:
            raise UserError(f"{source}: parameter {name!r} is {have[name]}, its {CONFIG_FILE} "
                            f"says {want[name]}; export it again")


def _load_run(folder: Path, which: str, shardings: Any
              ) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    config = load_json(folder / CONFIG_FILE)
    lora = config.get("lora")
    if lora and lora.rank:
        return config.model, _merged(folder, config, which, shardings)
    return config.model, _newest(folder, which, make_abstract(config.model), shardings)


def _newest(folder: Path, which: str, abstract: Any, shardings: Any = None) -> dict[str, Any]:
    """The parameters `abstract` of the newest checkpoint that can be read."""
    steps = sorted((int(p.name) for p in (folder / CHECKPOINTS).iterdir() if p.name.isdigit()),
                   reverse=True)
    problem = "it holds none"
    for step in steps:
        try:
            return _read_checkpoint(folder / CHECKPOINTS / str(step), which, abstract, shardings)
        except UserError:
            raise
        except Exception as error:  # whatever a torn checkpoint makes the reader raise
            problem = f"step {step}: {type(error).__name__}"
    raise UserError(f"{folder} has no readable checkpoint ({problem}); continue the run so that it "
                    "saves one")


def _read_checkpoint(folder: Path, which: str, abstract: Any, shardings: Any) -> dict[str, Any]:
    """One parameter tree out of a checkpoint; the rest of the state is not read."""
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    if shardings is not None and jax.tree.structure(abstract) == jax.tree.structure(shardings):
        args = jax.tree.map(lambda leaf, where: ocp.ArrayRestoreArgs(
            sharding=where, global_shape=leaf.shape, dtype=leaf.dtype), abstract, shardings)
    else:
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    name = "generator_ema" if which == "ema" else "generator"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore((folder / "state").resolve(), args=ocp.args.PyTreeRestore(
            item={name: abstract}, restore_args={name: args}, partial_restore=True))
    params = state[name]
    _check_keys(Leaves(flatten(params)).shapes(), abstract, str(folder))
    return params


# -- runs that trained adapters (config.lora) ------------------------------------------------------


def adapted_run(path: str | Path, lora: Any = None) -> ml_collections.ConfigDict | None:
    """The config of a run that trained adapters (such as those of `lora`, if given); else None."""
    if not str(path) or str(path).startswith(BUNDLED) or not _is_run(Path(path)):
        return None
    config = load_json(Path(path) / CONFIG_FILE)
    here = config.get("lora")
    if not here or not here.rank:
        return None
    same = lora is None or all(here[key] == lora[key] for key in ("rank", "alpha"))
    return config if same else None


def base_of_adapters(source: str, which: str, lora: Any) -> tuple[str, str]:
    """(path, which) of the weights below the adapters of a run that starts from `source`.

    A run that goes on with the adapters of another has that one's base.
    """
    config = adapted_run(source, lora)
    if config is None:
        return source, which
    return base_of_adapters(*_start_of(config), lora)


def _start_of(config: Any) -> tuple[str, str]:
    if config.init.generator:
        return config.init.generator, config.init.generator_weights
    return config.init.diffusion, "ema"


def load_adapters(path: str | Path, which: str = "ema") -> tuple[Any, dict[str, Any]]:
    """(config, adapters as a nested dict of numpy arrays) of a run that trained some.

    UserError for any other path.
    """
    from apt_jax.models.presets import make_generator
    from apt_jax.nn.lora import split

    config = adapted_run(path)
    if config is None:
        raise UserError(f"{path} is no run that trained adapters; give one with lora.rank set")
    adapters, _ = split(make_generator(config.model, config.lora).abstract())
    return config, _newest(Path(path), which, adapters)


def _merged(folder: Path, config: Any, which: str, shardings: Any) -> dict[str, Any]:
    """The base of an adapted run with its adapters in it."""
    import jax

    from apt_jax.models.presets import adapter_scale
    from apt_jax.nn.lora import join, merge

    _, adapters = load_adapters(folder, which)
    base = base_of_adapters(*_start_of(config), config.lora)
    _, params = load_generator(*base, shardings)
    if isinstance(jax.tree.leaves(params)[0], jax.Array):
        adapters = jax.tree.map(jax.numpy.asarray, adapters)
    return merge(join(params, adapters), adapter_scale(config.lora))


def export_run(run: str | Path, folder: str | Path, *, which: str = "ema", bfloat16: bool = False,
               card: Mapping[str, Any] | None = None) -> Path:
    """Writes the newest generator of a run as a weights folder (this made the bundled base).

    The card also says what the run's config says of data and sampling, so that a sampler finds
    its defaults there.
    """
    model, params = load_generator(run, which)
    config = load_json(Path(run) / CONFIG_FILE)
    described = {"weights": which, "stage": config.stage, "data": _plain(config.data),
                 "sample": _plain(config.sample), **(card or {})}
    return save_generator(folder, model, params, described, bfloat16=bfloat16)
