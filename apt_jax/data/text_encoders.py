"""Prompts to text states with a checkpoint's own encoder: UMT5 for Wan, Qwen2.5-VL for Qwen-Image.

Both follow their diffusers pipelines: how the prompt is cleaned or wrapped, where it is cut, which
states are kept. They look like `captions.TextEncoder`: a name, a width, and encode().
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from apt_jax.data.vae_codec import _card, folder_digest
from apt_jax.errors import UserError, disk_errors

log = logging.getLogger("apt_jax")

_BATCH = 8  # prompts of one call: one compilation for each padded length


def load_text_encoder(folder: str | pathlib.Path, dtype: str = "bfloat16"):
    """The text encoder of a component folder (or of its text_encoder/).

    dtype: of its weights and computation, "bfloat16" or "float32". Weights are read on first use.
    UserError for a folder without one, or of a kind that is not known here.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"--text-encoder: there is no folder {folder}; apt-jax convert import "
                        "writes one")
    for found in (folder / "text_encoder", folder / "source" / "text_encoder", folder):
        if (found / "config.json").is_file():
            card = _card(found)
            if card.get("kind") == "umt5":
                return UMT5Encoder(found, dtype)
            if card.get("model_type") == "qwen2_5_vl":
                return QwenEncoder(found, dtype)
    raise UserError(f"--text-encoder: {folder} holds no text encoder of a known kind (umt5 as "
                    "apt-jax convert import writes it, or Qwen2.5-VL's own folder)")


class UMT5Encoder:
    """Wan's text encoder: states after the final norm, trimmed to the prompt and its end token.

    The parameters are sharded over all local devices, so XXL (5.7B) fits a mesh of small ones.
    """

    def __init__(self, folder: pathlib.Path, dtype: str = "bfloat16"):
        from apt_jax.models.prompts import PromptTokenizer
        from apt_jax.models.umt5 import umt5_config

        self.folder, self.dtype = pathlib.Path(folder), dtype
        fields = _card(self.folder).get("umt5")
        if not isinstance(fields, dict):
            raise UserError(f"{self.folder / 'config.json'} has no umt5 table; import the "
                            "checkpoint again")
        self._config = umt5_config(fields, dtype=dtype)
        self.width = self._config.width
        tokenizers = (self.folder, self.folder.parent)
        place = next((p for p in tokenizers if (p / "tokenizer.json").is_file()
                      or (p / "tokenizer").is_dir()), self.folder.parent)
        self._tokenizer = PromptTokenizer(place)

    def __reduce__(self):
        return UMT5Encoder, (self.folder.absolute(), self.dtype)

    @functools.cached_property
    def name(self) -> str:
        """Which weights and tokenizer, and in which precision."""
        digest = folder_digest(self.folder, whole=False, beside=[self._tokenizer.path])
        return f"umt5 {digest} {self.dtype}"

    @functools.cached_property
    def _run(self):
        import jax
        import jax.numpy as jnp

        from apt_jax.models.umt5 import make_umt5
        from apt_jax.parallel.mesh import make_mesh
        from apt_jax.parallel.sharding import infer_shardings

        network = make_umt5(self._config)
        mesh = make_mesh({"fsdp": -1}, jax.local_devices())
        abstract = network.abstract()
        params = _read_params(self.folder, infer_shardings(abstract, mesh), abstract,
                              jnp.dtype(self.dtype))
        run = jax.jit(network)
        return lambda ids, mask: np.asarray(run(params, ids, mask), np.float32)

    def encode(self, captions: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(text float32 [B, L, D], mask bool [B, L]) with L = max_tokens; padding is zero.

        A caption over max_tokens (counting its end token) is cut and keeps the end token.
        """
        text = np.zeros((len(captions), max_tokens, self.width), np.float32)
        mask = np.zeros((len(captions), max_tokens), bool)
        longer = map(len, self._tokenizer.rows(list(captions), max_tokens + 1))
        _tell([c for c, n in zip(captions, longer) if n > max_tokens], len(captions), max_tokens)
        for start in range(0, len(captions), _BATCH):
            part = list(captions[start : start + _BATCH])
            ids, valid = self._tokenizer(part + [""] * (_BATCH - len(part)), max_tokens)
            states = self._run(ids, valid)  # [_BATCH, l, D]
            for i in range(len(part)):
                n = int(valid[i].sum())
                text[start + i, :n], mask[start + i, :n] = states[i, :n], True
        return text, mask


def _tell(cut: Sequence[str], total: int, max_tokens: int) -> None:
    """Warns of captions that were cut."""
    if cut:
        log.warning("%d of %d captions are longer than %d tokens and were cut, the first: %.60r",
                    len(cut), total, max_tokens, cut[0])


def _read_params(folder: pathlib.Path, shardings: Any, abstract: Any, dtype: Any) -> Any:
    """Parameters of `abstract`'s tree, read from the folder straight onto the devices."""
    import jax

    from apt_jax.parallel.place import place
    from apt_jax.parallel.sharding import STACKED, path_string
    from apt_jax.tensor_files import open_folder

    with disk_errors(folder, "read"), open_folder(folder) as tensors:
        have = tensors.shapes()

        def leaf(path, want, sharding):
            name = path_string(path)
            if have.get(name) != tuple(want.shape):
                raise UserError(f"{folder}: parameter {name!r} is {have.get(name)}, its config "
                                f"says {tuple(want.shape)}; import the checkpoint again")
            return place(lambda layer: tensors.read(name, layer), tuple(want.shape), dtype,
                         bool(STACKED.search(name)), sharding)

        return jax.tree_util.tree_map_with_path(leaf, abstract, shardings)


@contextlib.contextmanager
def _reading(folder: pathlib.Path):
    """Whatever transformers raises for files that it cannot use, as one line."""
    try:
        yield
    except Exception as error:  # safetensors', tokenizers' and the libraries' own kinds, no base
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"transformers cannot read {folder} ({line}); copy it from the checkpoint "
                        "again") from error


class QwenEncoder:
    """Qwen-Image's text encoder, run by transformers (an optional extra, with PyTorch).

    The prompt is wrapped in the pipeline's template and the states of the template's first tokens
    are dropped; the states are those of the last layer.
    """

    TEMPLATE = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
        "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
    # What decides the tokens. The first of them does alone; without it the second and third do.
    TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
                 "special_tokens_map.json", "tokenizer_config.json")
    UNUSED = ("visual.", "model.visual.", "lm_head.")  # tensors that no state depends on
    DROPPED = 34  # tokens of the template before the prompt
    LIMIT = 1024  # tokens of a prompt

    def __init__(self, folder: pathlib.Path, dtype: str = "bfloat16"):
        self.folder, self.dtype = pathlib.Path(folder), dtype
        card = _card(self.folder)
        inner = card.get("text_config")
        width = card.get("hidden_size") or (isinstance(inner, dict) and inner.get("hidden_size"))
        if type(width) is not int:
            raise UserError(f"{self.folder / 'config.json'} has no hidden_size; copy the text "
                            "encoder from the checkpoint again")
        self.width = width
        places = (self.folder.parent, self.folder.parent.parent, self.folder)
        self._tokens = next((p / "tokenizer" for p in places if (p / "tokenizer").is_dir()),
                            self.folder)
        whole, *parts = self.TOKENIZER[:3]
        lacks = [name for name in parts if not (self._tokens / name).is_file()]
        if lacks and not (self._tokens / whole).is_file():
            raise UserError(f"{self._tokens} has no Qwen tokenizer ({' and '.join(lacks)} missing, "
                            f"and no {whole}); copy the tokenizer folder from the checkpoint again")

    def __reduce__(self):
        return QwenEncoder, (self.folder.absolute(), self.dtype)

    @functools.cached_property
    def name(self) -> str:
        """Which weights and tokenizer, and in which precision."""
        digest = folder_digest(self.folder, whole=False, beside=[
            path for name in self.TOKENIZER if (path := self._tokens / name).is_file()])
        return f"qwen2_5_vl {digest} {self.dtype}"

    @functools.cached_property
    def _run(self):
        try:
            import torch
            import transformers
        except ImportError:
            raise UserError("Qwen-Image's text encoder runs on PyTorch; pip install "
                            "'apt_jax[convert]'") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with _reading(self._tokens):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self._tokens, local_files_only=True)
        with _reading(self.folder):
            model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                self.folder, dtype=getattr(torch, self.dtype), local_files_only=True,
                output_loading_info=True)
        # transformers draws what is missing at random, with a warning only.
        missing = sorted(k for k in info["missing_keys"] if not k.startswith(self.UNUSED))
        if missing:
            raise UserError(f"{self.folder} lacks {len(missing)} tensors, the first {missing[0]}; "
                            "copy it from the checkpoint again")
        model = model.to(device).eval()

        def run(prompts: list[str], limit: int) -> list[np.ndarray]:
            tokens = tokenizer([self.TEMPLATE.format(p) for p in prompts], padding=True,
                               max_length=limit + self.DROPPED, truncation=True,
                               return_tensors="pt").to(device)
            with torch.no_grad():
                states = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                               output_hidden_states=True).hidden_states[-1]
            return [row[valid.bool()][self.DROPPED:].float().cpu().numpy()
                    for row, valid in zip(states, tokens.attention_mask)]

        return run

    def encode(self, captions: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(text float32 [B, L, D], mask bool [B, L]) with L = max_tokens; padding is zero.

        A caption over max_tokens, counting the end of the template, is cut.
        """
        text = np.zeros((len(captions), max_tokens, self.width), np.float32)
        mask = np.zeros((len(captions), max_tokens), bool)
        limit, cut = min(max_tokens, self.LIMIT), []
        for start in range(0, len(captions), _BATCH):
            # One token more tells what is cut; no state before it knows of it.
            rows = self._run(list(captions[start : start + _BATCH]), limit + 1)
            for i, states in enumerate(rows, start):
                n = min(len(states), limit)
                text[i, :n], mask[i, :n] = states[:n], True
                if len(states) > limit:
                    cut.append(captions[i])
        _tell(cut, len(captions), max_tokens)
        return text, mask
