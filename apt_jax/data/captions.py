"""Captions to per-token text states with the demo's text encoder (all-MiniLM-L6-v2)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from apt_jax.errors import UserError
from apt_jax.models import minilm

log = logging.getLogger("apt_jax")

_BATCH = 32  # captions per call: one compilation per padded length
_LENGTHS = (16, 32, 64, 128, 256, 512)  # padded lengths; 512 is the model's limit


class TextEncoder:
    """Encodes captions; weights are read and the forward pass compiled on first use.

    Raises UserError with the pip line when the package with the weights is absent.
    """

    name = minilm.NAME
    width = minilm.WIDTH

    def __init__(self):
        folder = minilm.model_folder()
        self._weights = folder / "model.safetensors"
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file carries presets (128 tokens, padded); padding and cutting are done here.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @functools.cached_property
    def _run(self):
        params = jax.tree.map(jnp.asarray, minilm.load_params(self._weights))
        forward = jax.jit(minilm.forward)
        return lambda ids, mask: np.asarray(forward(params, ids, mask))

    def tokenize(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids with [CLS] and [SEP], at most max_tokens; a cut is logged and keeps [SEP].

        UserError for a max_tokens that is not in 2 to 512.
        """
        if not 2 <= max_tokens <= _LENGTHS[-1]:
            raise UserError(f"captions of {max_tokens} tokens: the text encoder {self.name} takes 2 "
                            f"to {_LENGTHS[-1]}; set data.max_text_tokens (of a data set: max_tokens)")
        ids = [e.ids for e in self._tokenizer.encode_batch(list(captions))]
        long = [i for i, row in enumerate(ids) if len(row) > max_tokens]
        if long:
            first = captions[long[0]]
            log.warning(
                "%d of %d captions are longer than %d tokens and were cut, the first: %.60r",
                len(long), len(ids), max_tokens, first,
            )
        return [r if len(r) <= max_tokens else r[: max_tokens - 1] + r[-1:] for r in ids]

    def encode(self, captions: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Per-token states: (text float32 [B, L, D], mask bool [B, L]) with L = max_tokens.

        Padding is zero and masked. The empty caption has two tokens. Captions over max_tokens
        (counting [CLS] and [SEP]) are cut, and a warning says so.
        """
        rows = self.tokenize(captions, max_tokens)
        text = np.zeros((len(rows), max_tokens, self.width), np.float32)
        mask = np.zeros((len(rows), max_tokens), bool)
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            length = next(n for n in _LENGTHS if n >= max(map(len, part)))
            ids = np.zeros((_BATCH, length), np.int32)
            valid = np.zeros((_BATCH, length), bool)
            valid[:, 0] = True  # rows without a caption: one token, so that softmax is defined
            for i, row in enumerate(part):
                ids[i, : len(row)] = row
                valid[i, : len(row)] = True
            states = self._run(ids, valid)
            for i, row in enumerate(part):
                text[start + i, : len(row)] = states[i, : len(row)]
                mask[start + i, : len(row)] = True
        return text, mask
