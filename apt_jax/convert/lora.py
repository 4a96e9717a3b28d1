"""LoRA files: merged into a base on import, written in diffusers' format from an adapted run.

A file holds "transformer.MODULE.lora_A.weight" [r, d_in] and "....lora_B.weight" [d_out, r]. A
module becomes W + (alpha / r) B A; alpha and r come from the file's adapter metadata, or from
"MODULE.alpha" tensors; without either the scale is 1. Files made for the original Wan code and
ComfyUI hold the same under other names ("diffusion_model.blocks.0.self_attn.q.lora_down.weight").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apt_jax.convert.engine import narrow
from apt_jax.convert.table import Plan
from apt_jax.errors import UserError
from apt_jax.tensor_files import NAMES, Spec, TensorSet, read_metadata, write_files

FILE = "pytorch_lora_weights.safetensors"  # what pipe.load_lora_weights looks for in a folder
PREFIX = "transformer"
METADATA = "lora_adapter_metadata"

_KEY = re.compile(r"(?:(?:transformer|diffusion_model)\.)?(?P<module>.+)\."
                  r"(?P<part>lora_(?:A|B|down|up)\.weight|alpha)")
_HALVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
# Modules of the original Wan code, and diffusers' names of them; no name is of both.
_ORIGINAL = [(re.compile(f"{old}$"), new) for old, new in (
    (r"\.self_attn\.([qkv])", r".attn1.to_\1"), (r"\.self_attn\.o", ".attn1.to_out.0"),
    (r"\.cross_attn\.([qkv])", r".attn2.to_\1"), (r"\.cross_attn\.o", ".attn2.to_out.0"),
    (r"\.ffn\.0", ".ffn.net.0.proj"), (r"\.ffn\.2", ".ffn.net.2"), (r"^head\.head", "proj_out"),
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"))]
_KOHYA = "lora_unet_"
_MERGE = ("merge it in diffusers (load_lora_weights, fuse_lora, unload_lora_weights, "
          "save_pretrained) and import that folder")
# Metadata that would make it another kind of adapter.
_PLAIN = {"use_rslora": False, "use_dora": False, "lora_bias": False, "bias": "none",
          "modules_to_save": None, "fan_in_fan_out": False}


class Adapter(NamedTuple):
    """One module's adapter, as arrays: W + scale * b @ a. a [r, d_in], b [d_out, r], float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def read_lora(path: str | Path, plan: Plan) -> dict[str, Adapter]:
    """The adapters of a file by the name of the weight that they change.

    UserError for a key that is not understood or names no matrix of the model, for half an
    adapter, for shapes that do not fit, and for other kinds of adapters.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE
    found: dict[str, dict[str, np.ndarray]] = {}
    with TensorSet([path]) as tensors:
        metadata = _metadata(path)
        for name, tensor in tensors.tensors.items():
            match = _KEY.fullmatch(name)
            if match is None or name.startswith(_KOHYA):
                raise UserError(f"{path}: {_unread(name)}; {_MERGE}")
            if NAMES[tensor.dtype] not in ("F32", "F16", "BF16"):
                raise UserError(f"{path}: {name} is {NAMES[tensor.dtype]}; give a LoRA in float32, "
                                "float16 or bfloat16")
            module, part = match["module"], _HALVES.get(match["part"], match["part"])
            for pattern, new in _ORIGINAL:
                module = pattern.sub(new, module)
            parts = found.setdefault(module, {})
            if part in parts:
                raise UserError(f"{path} has {module} twice, under two names; remove one")
            parts[part] = tensors.read(name).astype(np.float32)
    if not found:
        raise UserError(f"{path} holds no tensors; give a LoRA file")
    return {f"{module}.weight": _adapter(path, module, parts, metadata, plan)
            for module, parts in found.items()}


def _unread(name: str) -> str:
    """What a key is of that none of our formats has."""
    if name.startswith(_KOHYA):
        return f"{name} is of kohya's format ({_KOHYA}...), which is not read"
    if name.endswith((".diff", ".diff_b")):
        return f"{name} is the difference of a whole tensor, which is no LoRA"
    return (f"{name} is not of a LoRA in diffusers' format (transformer.MODULE.lora_A.weight) or "
            "the original one (diffusion_model.MODULE.lora_down.weight)")


def _adapter(path: Path, module: str, parts: Mapping[str, np.ndarray],
             metadata: Mapping[str, Any], plan: Plan) -> Adapter:
    name = f"{module}.weight"
    shape = plan.theirs.get(name, ())
    if len(shape) != 2:
        raise UserError(f"{path} adapts {module}, which is no matrix of this model; give a LoRA "
                        "that was trained on it")
    for half in ("lora_A.weight", "lora_B.weight"):
        if half not in parts:
            raise UserError(f"{path} lacks {module}.{half}; copy the file again")
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    rank = len(a) if a.ndim else 0
    if not rank or a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
        raise UserError(f"{path}: {module} has A {a.shape} and B {b.shape}, its matrix is {shape}; "
                        "give a LoRA that was trained on this model")
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        raise UserError(f"{path}: {module} has numbers that are not finite; give a LoRA whose "
                        "training went well")
    if "alpha" in parts:
        if parts["alpha"].size != 1 or not np.isfinite(parts["alpha"]).all():
            raise UserError(f"{path}: {module}.alpha is no single number; copy the file again")
        return Adapter(a, b, float(parts["alpha"].reshape(())) / rank)
    if not metadata:
        return Adapter(a, b, 1.0)
    # peft's patterns are the ends of module names, regular expressions among them
    try:
        alpha = next((value for ending, value in (metadata.get("alpha_pattern") or {}).items()
                      if re.fullmatch(rf"(.*\.)?({ending})", module)),
                     metadata.get("lora_alpha", rank))
        return Adapter(a, b, float(alpha) / rank)
    except (AttributeError, TypeError, ValueError, re.error):
        raise UserError(f"{path}: the alpha of {module} in its {METADATA} is no number; copy the "
                        "file again") from None


def _metadata(path: Path) -> dict[str, Any]:
    """The adapter's own config, {} if the file has none; UserError for another kind of adapter."""
    text = read_metadata(path).get(METADATA)
    if not text:
        return {}
    try:
        found = {key.removeprefix(f"{PREFIX}."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(f"{path}: its {METADATA} is not valid JSON; copy the file again") from None
    for key, plain in _PLAIN.items():
        if found.get(key, plain) not in (plain, False, None, []):
            raise UserError(f"{path}: {key} = {found[key]!r} is another kind of adapter than "
                            "LoRA's B A; merge it with its own library first")
    return found


class Merged:
    """A `TensorSet` of a base with the adapters of a file in it; the base's dtypes stay.

    Every tensor is merged when it is read, in float32.
    """

    def __init__(self, base: TensorSet, adapters: Mapping[str, Adapter], strength: float = 1.0):
        self._base, self._adapters, self._strength = base, adapters, strength
        self.files, self.tensors = base.files, base.tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._base.shapes()

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        value = self._base.read(name)
        if name in self._adapters:
            a, b, scale = self._adapters[name]
            value = narrow(value.astype(np.float32) + (scale * self._strength) * (b @ a),
                           value.dtype, name, "lower --lora-scale, or take a base in bfloat16")
        return value if index is None else value[index]

    def __exit__(self, *_: object) -> None:
        self._base.__exit__()


def write_lora(folder: Path, plan: Plan, adapters: Mapping[str, np.ndarray], scale: float
               ) -> None:
    """Writes adapters of ours as FILE into a folder.

    Args:
      adapters: flat, "a/b/lora_a" [layers, d_in, r] and "a/b/lora_b" [layers, r, d_out].
      scale: alpha over rank; it goes into B, so that every reader has it right.
    """
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(adapters):
        if not name.endswith("/lora_a"):
            continue
        stem = name.removesuffix("lora_a")
        down, up = adapters[name], adapters[f"{stem}lora_b"]
        leaf = plan.leaves[f"{stem}kernel"]
        for layer, row in enumerate(leaf.parts):
            pieces = np.split(np.asarray(up[layer], np.float32), len(row), axis=-1)
            for part, piece in zip(row, pieces, strict=True):
                module = f"{PREFIX}.{part.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(
                    np.asarray(down[layer], np.float32).T)
                tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(scale * piece.T)
    specs = [Spec(name, value.dtype, value.shape) for name, value in tensors.items()]
    write_files(folder, Path(FILE).stem, specs, tensors.values(), limit=math.inf,
                metadata={"format": "pt"})
