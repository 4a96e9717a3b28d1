"""Generator weights on disk: a folder with model.safetensors and config.json.

model.safetensors holds flat "a/b/c" keys, config.json {"kind": "generator", "model": {...}, ...}.
The same loader reads the bundled base and the checkpoints of a run.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from apt_jax.config import load_json
from apt_jax.errors import UserError

BUNDLED = "bundled:"
WEIGHTS_FILE, CONFIG_FILE, CHECKPOINTS = "model.safetensors", "config.json", "checkpoints"
KIND = "generator"


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


def load_generator(path: str | Path, which: str = "ema"
                   ) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """Reads a generator.

    Args:
      path: "bundled:base", a weights folder, or a run folder (its newest readable checkpoint).
      which: "ema" or "raw": which weights of a run; a weights folder holds one set.

    Returns:
      Its config.model, and the parameters as a nested dict of float32 numpy arrays.

    Raises:
      UserError: nothing there, an incomplete or damaged folder, keys that do not fit the model.
    """
    if which not in ("ema", "raw"):
        raise UserError(f"which = {which!r} is unknown; use 'ema' or 'raw'")
    text = str(path)
    if text.startswith(BUNDLED):
        return _load_bundled(text.removeprefix(BUNDLED))
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run folder, a weights folder or "
                        "'bundled:base'")
    if (folder / WEIGHTS_FILE).is_file():
        return _load_folder(folder)
    if (folder / CHECKPOINTS).is_dir():
        return _load_run(folder, which)
    raise UserError(f"{folder} holds neither {WEIGHTS_FILE} nor {CHECKPOINTS}/; give a run folder "
                    "that has saved a checkpoint, or a weights folder")


def generator_card(path: str | Path) -> dict[str, Any]:
    """What a weights folder (or bundled weights) says of itself; {} for a run, without card."""
    text = str(path)
    folder = (resources.files("apt_jax") / "assets" / text.removeprefix(BUNDLED)
              if text.startswith(BUNDLED) else Path(path))
    if not (folder / WEIGHTS_FILE).is_file():
        return {}
    return _read_card(folder)


def _load_bundled(name: str) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    root = resources.files("apt_jax") / "assets" / name
    if not (root / WEIGHTS_FILE).is_file():
        raise UserError(f"there are no bundled weights {BUNDLED}{name}; the package ships "
                        f"{BUNDLED}base")
    with resources.as_file(root) as folder:
        return _load_folder(Path(folder))


def _read_card(folder: Any) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder} has no readable {CONFIG_FILE}; copy it from where the weights "
                        "came from") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / CONFIG_FILE} is not valid JSON ({error}); copy it "
                        "again") from None


def _load_folder(folder: Path) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    description = _read_card(folder)
    if description.get("kind") != KIND or not isinstance(description.get("model"), dict):
        raise UserError(f"{folder / CONFIG_FILE} does not describe a generator (kind = "
                        f"{description.get('kind')!r}); give a folder that export wrote")
    model = ml_collections.ConfigDict(
        {key: tuple(value) if isinstance(value, list) else value
         for key, value in description["model"].items()})
    params = unflatten(_read_safetensors(folder / WEIGHTS_FILE))
    _check_keys(params, model, str(folder))
    return model, params


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All arrays, floats as float32 (safetensors' numpy reader has no bfloat16)."""
    import ml_dtypes
    from safetensors import SafetensorError, deserialize

    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    try:
        tensors = deserialize(path.read_bytes())
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is damaged or incomplete ({error}); copy or export it again"
                        ) from None
    flat = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in kinds:
            raise UserError(f"{path}: {name} has dtype {tensor['dtype']}; generator weights are "
                            "floating point")
        values = np.frombuffer(tensor["data"], kinds[tensor["dtype"]]).reshape(tensor["shape"])
        flat[name] = values.astype(np.float32)
    return flat


def _check_keys(params: Any, model: Any, source: str) -> None:
    """Missing, unknown and misshapen parameters, by name."""
    from apt_jax.models.presets import make_generator

    want = {k: tuple(v.shape) for k, v in flatten(make_generator(model).abstract()).items()}
    have = {k: tuple(v.shape) for k, v in flatten(params).items()}
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


def _load_run(folder: Path, which: str) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    config = load_json(folder / CONFIG_FILE)
    steps = sorted((int(p.name) for p in (folder / CHECKPOINTS).iterdir() if p.name.isdigit()),
                   reverse=True)
    problem = "it holds none"
    for step in steps:
        try:
            params = _read_checkpoint(folder / CHECKPOINTS / str(step), config.model, which)
        except UserError:
            raise
        except Exception as error:  # whatever a torn checkpoint makes the reader raise
            problem = f"step {step}: {type(error).__name__}"
            continue
        return config.model, params
    raise UserError(f"{folder} has no readable checkpoint ({problem}); continue the run so that it "
                    "saves one")


def _read_checkpoint(folder: Path, model: Any, which: str) -> dict[str, Any]:
    """One parameter tree out of a checkpoint, as numpy; the rest of the state is not read."""
    import jax
    import orbax.checkpoint as ocp

    from apt_jax.models.presets import make_generator

    logging.getLogger("absl").setLevel(logging.ERROR)
    item = {"generator_ema" if which == "ema" else "generator": make_generator(model).abstract()}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore((folder / "state").resolve(), args=ocp.args.PyTreeRestore(
            item=item, restore_args=restore_args, partial_restore=True))
    (params,) = state.values()
    _check_keys(params, model, str(folder))
    return params


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
