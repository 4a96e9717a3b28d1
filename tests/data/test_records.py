"""Records, quantised text and shards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.data import records
from apt_jax.data.quantise import dequantise, pad_states, quantise
from apt_jax.errors import UserError


def make(frames, caption="a caption", tokens=3):
    states = np.random.default_rng(0).normal(size=(tokens, 12))
    f, h, w, _ = frames.shape
    return records.Record(f, h, w, 8.0, caption, "a/b.png", "b", *quantise(states),
                          records.encode_frames(frames, 100))


@given(st.text(max_size=40), st.integers(1, 20))
def test_pack_and_unpack(caption, tokens):
    record = make(np.zeros((2, 4, 6, 3), np.uint8), caption, tokens)
    back = records.unpack(records.pack(record))
    for key in ("frames", "height", "width", "fps", "caption", "source", "group", "picture"):
        assert getattr(back, key) == getattr(record, key)
    np.testing.assert_array_equal(back.text_values, record.text_values)
    np.testing.assert_array_equal(back.text_scales, record.text_scales)


@given(st.integers(1, 30), st.floats(1e-3, 1e3))
def test_quantisation_error_is_half_a_step(tokens, size):
    states = (np.random.default_rng(tokens).normal(size=(tokens, 24)) * size).astype(np.float32)
    values, scales = quantise(states)
    error = np.abs(dequantise(values, scales) - states)
    assert (error <= scales[:, None] * 0.5001).all()
    assert np.abs(values).max() == 127


def test_quantised_zero_is_zero():
    values, scales = quantise(np.zeros((2, 8)))
    assert not dequantise(values, scales).any() and np.isfinite(scales).all()


def test_pad_states_pads_and_cuts():
    states = np.ones((3, 4), np.float32)
    text, mask = pad_states(states, 5)
    assert mask.tolist() == [True] * 3 + [False] * 2
    assert text[:3].all() and not text[3:].any()
    text, mask = pad_states(states, 2)
    assert text.shape == (2, 4) and mask.all()


@pytest.mark.parametrize("shape", [(1, 8, 6, 3), (5, 8, 6, 3), (5, 6000, 2, 3)])
def test_frames_keep_their_order(shape):
    """The last shape does not fit one column under WebP's limit."""
    frames = np.stack([np.full(shape[1:], 40 * i, np.uint8) for i in range(shape[0])])
    back = records.decode_frames(records.encode_frames(frames), *shape[:3])
    assert back.shape == shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).max() <= 3


@pytest.mark.parametrize("spoil", [
    lambda d: d[:5], lambda d: b"XXXX" + d[4:], lambda d: d[:60], lambda d: d[:4] + b"\x09" + d[5:],
])
def test_damaged_records_are_told(spoil):
    data = records.pack(make(np.zeros((1, 4, 4, 3), np.uint8)))
    with pytest.raises(ValueError):
        records.unpack(spoil(data))


def test_a_clip_of_more_pixels_than_pillow_reads_is_refused_when_prepared(monkeypatch):
    records.check_size(160, 720, 1280)
    with pytest.raises(UserError, match="240 frames of 1280x720 do not fit one WebP .*178,956,970"):
        records.check_size(240, 720, 1280)
    picture = records.encode_frames(np.zeros((4, 8, 8, 3), np.uint8))
    monkeypatch.setattr(records.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        records.decode_frames(picture, 4, 8, 8)


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    def broken():
        yield b"one"
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        records.write_shard(tmp_path / "a.arrayrecord", broken())
    assert not (tmp_path / "a.arrayrecord").exists()
    assert records.write_shard(tmp_path / "a.arrayrecord", [b"one", b"two"]) == 2
    first = (tmp_path / "a.arrayrecord").read_bytes()
    records.write_shard(tmp_path / "b.arrayrecord", [b"one", b"two"])
    assert (tmp_path / "b.arrayrecord").read_bytes() == first  # nothing random in a shard
