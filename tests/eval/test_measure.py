"""The whole measurement on synthetic pictures: identity, monotony, cache, floor, clips."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageFilter

from apt_jax.errors import UserError
from apt_jax.eval import measure as measuring
from apt_jax.eval.frechet import Projection
from apt_jax.eval.measure import Reference, floor, known_features, measure
from apt_jax.eval.samples import load_samples, save_samples

DIM = 8


def _pictures(n, frames=1, size=24, seed=0):
    """Coloured discs on coloured ground; in a clip the disc moves to the right."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    out = np.empty((n, frames, size, size, 3), np.uint8)
    for clip in out:
        ground, ink = rng.integers(0, 256, (2, 3))
        row, column, radius = rng.uniform(6, 18), rng.uniform(4, 12), rng.uniform(3, 8)
        for f, frame in enumerate(clip):
            inside = (y - row) ** 2 + (x - column - 3 * f) ** 2 < radius ** 2
            frame[:] = np.where(inside[..., None], ink, ground)
    return out


@pytest.fixture(scope="module")
def images():
    return Reference.build(_pictures(96), DIM, label="")


@pytest.fixture(scope="module")
def clips():
    return Reference.build(_pictures(24, frames=3), DIM, label="")


def _blur(frames, radius):
    flat = [np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(radius)))
            for f in frames.reshape(-1, *frames.shape[2:])]
    return np.stack(flat).reshape(frames.shape)


def _noise(frames, level):
    noise = np.random.default_rng(1).normal(0, level, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def test_the_data_against_itself_is_zero(images):
    result = measure(images.frames, images)
    assert result["fd"] == pytest.approx(0, abs=1e-4)
    assert result["sharpness_ratio"] == pytest.approx(1)
    assert (result["n"], result["dim"], result["reference"]) == (96, DIM, images.hash)
    assert "fd_motion" not in result
    # The hash is of the pixels and the dimensions, not of sums that another machine rounds anew.
    shaken = dataclasses.replace(images, features=images.features + 1e-6, projection=Projection(
        images.projection.mean + np.float32(1e-6), images.projection.components))
    assert shaken.hash == images.hash and shaken.projection.hash != images.projection.hash
    fewer = Projection(images.projection.mean, images.projection.components[:, 1:])
    assert dataclasses.replace(images, projection=fewer).hash != images.hash
    assert dataclasses.replace(images, frames=images.frames ^ 1).hash != images.hash


@pytest.mark.parametrize("spoil, levels", [(_blur, (0.5, 1, 2)), (_noise, (5, 15, 40))])
def test_fd_grows_with_the_damage(images, spoil, levels):
    results = [measure(spoil(images.frames, level), images) for level in levels]
    distances = [r["fd"] for r in results]
    assert 0 < distances[0] < distances[1] < distances[2]
    ratios = [r["sharpness_ratio"] for r in results]
    assert ratios == sorted(ratios, reverse=spoil is _blur)


def test_missing_modes_raise_fd(images):
    few = np.repeat(images.frames[:8], 12, axis=0)
    other_half = _pictures(96, seed=7)
    assert measure(few, images)["fd"] > 2 * measure(other_half, images)["fd"]


def test_frozen_clips_raise_only_the_motion_distance(clips):
    frozen = clips.frames[:, :1].repeat(3, axis=1)
    moving, still = measure(clips.frames, clips), measure(frozen, clips)
    assert moving["fd_motion"] == pytest.approx(0, abs=1e-4) and moving["n"] == 24
    assert still["fd_motion"] > 10 * max(moving["fd_motion"], 1e-3)


def test_floor_is_small_and_reproducible(images):
    first, again = floor(images), floor(images)
    assert first == again and first["n"] == 96 and first["halves"] == [48, 48]
    assert 0 < first["fd_low"] <= first["fd"] <= first["fd_high"]
    assert first["fd"] < measure(_blur(images.frames, 2), images)["fd"]


def test_the_cache_is_used_and_survives_damage(tmp_path, monkeypatch):
    frames = _pictures(16, seed=3)
    first = Reference.build(frames, 4, tmp_path, label="")
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(measuring, "clip_features", lambda *a: pytest.fail("cache not used"))
    cached = Reference.build(frames, 4, tmp_path, label="")
    np.testing.assert_array_equal(cached.features, first.features)
    assert cached.hash == first.hash
    np.testing.assert_array_equal(known_features(frames, tmp_path, 4), first.features)
    assert known_features(frames, tmp_path, 5) is known_features(frames[1:], tmp_path, 4) is None
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:100])
    assert Reference.build(frames, 4, tmp_path, label="").hash == first.hash
    changed = frames.copy()
    changed[0, 0, 0, 0, 0] ^= 1
    Reference.build(changed, 4, tmp_path, label="")
    assert len(list(tmp_path.iterdir())) == 2  # other data, other file


def test_sizes_and_counts_that_do_not_fit_are_refused(images):
    with pytest.raises(UserError, match="measure both at one size"):
        measure(images.frames[:, :, ::2, ::2], images)
    with pytest.raises(UserError, match="at least 16"):
        measure(images.frames[:15], images)


def test_samples_round_trip(tmp_path):
    frames = _pictures(3)
    path = save_samples(tmp_path / "deep" / "a.npz", frames, ["red heart", "", "naïve ☺"])
    back = load_samples(path)
    np.testing.assert_array_equal(back.frames, frames)
    assert back.captions == ["red heart", "", "naïve ☺"]
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


def test_sample_files_never_unpickle(tmp_path):
    np.savez(tmp_path / "bad.npz", frames=_pictures(1), captions=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="no sample file"):
        load_samples(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="no sample file"):
        load_samples(tmp_path / "missing.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="no sample file"):
        load_samples(tmp_path / "cut.npz")
    np.save(tmp_path / "frames.npy", _pictures(1))
    with pytest.raises(UserError, match="no sample file"):
        load_samples(tmp_path / "frames.npy")
    header = io.BytesIO()  # more than there is memory for
    np.lib.format.write_array_header_1_0(header, {
        "descr": "|u1", "fortran_order": False, "shape": (10**10, 4, 64, 64, 3)})
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as file:
        file.writestr("frames.npy", header.getvalue() + b"abc")
    with pytest.raises(UserError, match="no sample file"):
        load_samples(tmp_path / "claims.npz")
    whole = save_samples(tmp_path / "spoilt.npz", _pictures(3), ["a", "b", "c"])
    data = bytearray(whole.read_bytes())
    data[200:240] = bytes(40)
    whole.write_bytes(data)
    with pytest.raises(UserError, match="no sample file"):
        load_samples(whole)
    for frames, captions in ((_pictures(2)[..., :1], ["a", "b"]), (_pictures(1), "a"),
                             (_pictures(1)[:, :, :0], ["a"]), (_pictures(1)[:0], [])):
        np.savez(tmp_path / "odd.npz", frames=frames, captions=np.array(captions, np.str_))
        with pytest.raises(UserError, match="expected uint8"):
            load_samples(tmp_path / "odd.npz")
    with pytest.raises(UserError, match="one for each"):
        save_samples(tmp_path / "x.npz", _pictures(2), ["one"])
