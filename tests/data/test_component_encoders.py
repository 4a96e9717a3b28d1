"""The VAE and the text encoder of a checkpoint, as preparation runs them."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_checkpoint as tiny

from apt_jax.data import text_encoders
from apt_jax.data.text_encoders import UMT5Encoder, load_text_encoder
from apt_jax.data.vae_codec import VaeCodec
from apt_jax.errors import UserError
from apt_jax.models.umt5 import make_umt5
from apt_jax.models.vae import load_vae
from apt_jax.parallel import sharding


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wan")


@pytest.fixture(scope="module")
def codec(checkpoint):
    return VaeCodec(checkpoint, 1, "float32")


def test_latents_are_the_vaes_on_every_device(checkpoint, codec):
    assert codec.channels == 16 and codec.batch == jax.local_device_count() == 8
    assert codec.latent_shape(5, 16, 32) == (2, 2, 4)
    frames = np.random.default_rng(0).integers(0, 256, (8, 5, 16, 32, 3)).astype(np.uint8)
    found = codec.encode(frames)
    assert len(found.sharding.device_set) == 8
    vae, params = load_vae(checkpoint, "float32")
    want = jax.jit(vae.encode)(params, frames[[0, 6]].astype(np.float32) / 127.5 - 1)
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found[[0, 6]], want, atol=0.01 * np.abs(want).max())
    short = np.asarray(codec.encode(frames[:3]), np.float32)  # padded to the same program
    assert short.shape == (3, 2, 2, 4, 16)
    np.testing.assert_array_equal(short, found[:3])


def test_states_are_the_encoders_trimmed(checkpoint, caplog):
    encoder = load_text_encoder(checkpoint, "float32")
    assert isinstance(encoder, UMT5Encoder) and encoder.width == 24
    text, mask = encoder.encode(["a cat", "", "a  film &amp; cat"], 5)
    assert text.shape == (3, 5, 24) and text.dtype == np.float32
    assert mask.sum(1).tolist() == [3, 1, 5] and not text[~mask].any()
    network = make_umt5(tiny.UMT5)
    params = tiny.random_params(network, 2)
    ids = np.array([[3, 8, 1]], np.int32)  # a, cat, the end
    want = network(params, ids, np.ones_like(ids, bool))
    np.testing.assert_allclose(text[0, :3], want[0], atol=1e-5)
    long, mask = encoder.encode(["a film a film a film a film"], 4)
    assert "1 of 1 captions are longer than 4" in caplog.text and len(caplog.records) == 1
    assert mask.all() and np.abs(long[0, 3] - long[0, 1]).max() > 0.01


def test_the_text_encoder_lies_in_shards_on_all_devices(checkpoint, monkeypatch):
    """As XXL does; this one is small enough to be kept whole, so the threshold is lowered."""
    whole, mask = load_text_encoder(checkpoint, "float32").encode(["a cat", "a film"], 4)
    monkeypatch.setattr(sharding, "infer_shardings",
                        functools.partial(sharding.infer_shardings, min_elements=8))
    held, read = [], text_encoders._read_params
    monkeypatch.setattr(text_encoders, "_read_params",
                        lambda *given: held.append(read(*given)) or held[0])
    cut, same = load_text_encoder(checkpoint, "float32").encode(["a cat", "a film"], 4)
    np.testing.assert_array_equal(mask, same)
    np.testing.assert_allclose(cut, whole, atol=1e-5)
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(held[0]))
    assert here < 0.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(held[0]))
    assert len(held[0]["embedding"].sharding.device_set) == 8


def test_names_tell_weights_and_precision_apart(checkpoint, codec, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    assert VaeCodec(other, 4, "float32").name == codec.name
    assert VaeCodec(other, 1, "bfloat16").name != codec.name
    first = load_text_encoder(other).name
    words = other / "tokenizer" / "tokenizer.json"
    text = words.read_text()
    assert text.count('"cat":8') + text.count('"cat": 8') == 1
    words.write_text(text.replace('"cat"', '"dog"'))
    assert load_text_encoder(other).name != first  # another tokenizer gives other states
    words.write_text(text)
    assert load_text_encoder(other).name == first
    for part in ("vae", "text_encoder"):
        path = other / part / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert VaeCodec(other, 1, "float32").name != codec.name
    assert load_text_encoder(other).name != first


def test_they_travel_without_their_weights(checkpoint, codec, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    for thing in (codec, VaeCodec(checkpoint.name), load_text_encoder(checkpoint.name)):
        kind, arguments = thing.__reduce__()
        assert kind(*arguments).name == thing.name
        assert all(isinstance(value, str | int | Path) for value in arguments)
        assert arguments[0].is_absolute()  # a worker may begin in another folder


def test_wrong_folders_are_one_line(checkpoint, tmp_path):
    for load in (VaeCodec, load_text_encoder):
        with pytest.raises(UserError, match="no folder"):
            load(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"kind": "generator"}')
    with pytest.raises(UserError, match="does not describe a VAE"):
        VaeCodec(tmp_path)
    with pytest.raises(UserError, match="no text encoder of a known kind"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "umt5"}')
    with pytest.raises(UserError, match="config.json has no umt5 table"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "text_config": 3}')
    with pytest.raises(UserError, match="config.json has no hidden_size"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": ')
    with pytest.raises(UserError, match="JSON"):
        VaeCodec(tmp_path)


def test_a_missing_tokenizer_and_damaged_weights_are_one_line(checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer"):
        load_text_encoder(broken)
    tiny.save_words(broken / "tokenizer")
    for part in ("vae", "text_encoder"):
        path = broken / part / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors"):
        load_text_encoder(broken).encode(["a cat"], 4)
    for thing in (load_text_encoder(broken), VaeCodec(broken)):
        with pytest.raises(UserError, match="model.safetensors is damaged or incomplete"):
            thing.name  # noqa: B018  what prepare asks for before it looks at any file
    with pytest.raises(UserError, match="model.safetensors"):
        VaeCodec(broken).encode(np.zeros((1, 1, 16, 16, 3), np.uint8))
    card = json.loads((broken / "text_encoder" / "config.json").read_text())
    card["umt5"]["width"] = 25
    (broken / "text_encoder" / "config.json").write_text(json.dumps(card))
    shutil.copy(checkpoint / "text_encoder" / "model.safetensors", broken / "text_encoder")
    with pytest.raises(UserError, match="parameter 'blocks"):
        load_text_encoder(broken).encode(["a cat"], 4)
