"""Prompts to token ids as in Wan's pipeline: cleaned, then the checkpoint's own tokenizer."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apt_jax.errors import UserError

FILE = "tokenizer.json"
LENGTHS = (16, 32, 64, 128, 256, 512)  # padded lengths: one compilation of the encoder each


def clean_prompt(text: str) -> str:
    """Broken characters mended (where ftfy is installed, as in diffusers), HTML entities resolved
    (twice, as there), white space joined."""
    try:
        import ftfy
    except ImportError:
        pass
    else:
        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip()


class PromptTokenizer:
    """The tokenizer of a checkpoint: folder/tokenizer/tokenizer.json or folder/tokenizer.json.

    path: the file. Raises UserError when there is none or it cannot be read.
    """

    def __init__(self, folder: str | Path, eos: str = "</s>"):
        import tokenizers

        folder = Path(folder)
        places = [folder / "tokenizer" / FILE, folder / FILE]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise UserError(f"{folder} has no tokenizer ({places[0]}); copy the checkpoint's "
                            "tokenizer folder there, or import it again")
        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever is wrong
            raise UserError(f"{path} cannot be read as a tokenizer ({error}); copy it from the "
                            "checkpoint again") from None
        # The file may carry presets; padding and cutting are done here.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._eos = self._tokenizer.token_to_id(eos)
        if self._eos is None:
            raise UserError(f"{path} knows no token {eos!r}: it is not a T5 tokenizer; copy it "
                            "from the checkpoint again")

    def rows(self, prompts: Sequence[str], max_tokens: int = 512) -> list[list[int]]:
        """Ids of each cleaned prompt, at most max_tokens, each ending with the end token."""
        rows = []
        for encoding in self._tokenizer.encode_batch([clean_prompt(p) for p in prompts]):
            ids = encoding.ids
            ids = ids[:-1] if ids and ids[-1] == self._eos else ids
            rows.append(ids[: max_tokens - 1] + [self._eos])
        return rows

    def __call__(self, prompts: Sequence[str], max_tokens: int = 512
                 ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [B, L], mask bool [B, L]), padded with id 0 to the shortest of LENGTHS that
        holds the longest prompt (max_tokens if that is shorter)."""
        rows = self.rows(prompts, max_tokens)
        longest = max(map(len, rows), default=1)
        length = next((n for n in LENGTHS if n >= longest), longest)
        ids = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return ids, np.arange(length) < np.array([len(row) for row in rows])[:, None]
