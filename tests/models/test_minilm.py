"""The text encoder equals transformers' BertModel: committed outputs and, with torch, live."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from apt_jax.models import minilm

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILE = FIXTURES / "minilm.safetensors"
absent = importlib.util.find_spec(minilm.PACKAGE) is None


@pytest.fixture(scope="module")
def fixture():
    with safe_open(FILE, "np") as file:
        about = json.loads(file.metadata()["about"])
    return load_file(FILE), about


def relative_error(found, want, mask):
    return np.abs(found - want)[mask].max() / np.abs(want[mask]).max()


def converted(weights, tmp_path):
    """Through a file, as the real weights come."""
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, tmp_path / "w.safetensors")
    return minilm.load_params(tmp_path / "w.safetensors")


def test_a_small_random_bert(fixture, tmp_path):
    tensors, about = fixture
    start = "random.weights."
    weights = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    params = converted(weights, tmp_path)
    ids, mask = tensors["random.ids"], tensors["random.mask"]
    states = np.asarray(minilm.forward(params, ids, mask, about["heads"]))
    assert states.shape == (3, 9, 24) and states.dtype == np.float32
    assert relative_error(states, tensors["random.states"], mask) < 1e-5
    other = np.where(mask, ids, 7)  # what stands at masked places must not matter
    changed = np.asarray(minilm.forward(params, other, mask, about["heads"]))
    np.testing.assert_allclose(changed[mask], states[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(absent, reason=f"run: {minilm.PIP_LINE}")
def test_minilm_itself(fixture):
    """Tokens and states of real captions, through the class that users call."""
    from apt_jax.data.captions import TextEncoder

    tensors, about = fixture
    encoder, mask = TextEncoder(), tensors["minilm.mask"]
    rows = encoder.tokenize(about["captions"], 64)
    assert rows == [ids[valid].tolist() for ids, valid in zip(tensors["minilm.ids"], mask)]
    text, found = encoder.encode(about["captions"], mask.shape[1])
    np.testing.assert_array_equal(found, mask)
    assert relative_error(text, tensors["minilm.states"], mask) < 1e-5


@pytest.mark.parametrize("seed", [1, 2])
def test_live_against_torch(seed, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(FIXTURES), *sys.path])
    import minilm_reference as reference

    model, (ids, mask) = reference.random_bert(seed), reference.random_batch(seed)
    params = converted(reference.weights(model), tmp_path)
    states = np.asarray(minilm.forward(params, ids, mask, reference.HEADS))
    assert relative_error(states, reference.run(model, ids, mask), mask) < 1e-5
