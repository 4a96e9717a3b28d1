"""Media: exact bytes where the format is lossless, decodable files where it is not."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from apt_jax import media
from apt_jax.errors import UserError

RNG = np.random.default_rng(0)


def test_to_uint8_rounds_clips_and_inverts():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(media.to_uint8(media.from_uint8(every)), every)
    np.testing.assert_array_equal(
        media.to_uint8(np.array([-1.7, -1, 0.999, 1.3, np.inf])), [0, 0, 255, 255, 255])
    assert media.to_uint8(np.array(0.6 / 127.5 - 1)) == 1  # rounds, does not cut
    with pytest.raises(UserError, match="NaN"):
        media.to_uint8(np.array([np.nan]))


def test_png_is_lossless(tmp_path):
    image = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        np.asarray(Image.open(media.save_png(tmp_path / "a" / "x.png", image))), image)
    with pytest.raises(UserError, match="to_uint8"):
        media.save_png(tmp_path / "x.png", image.astype(np.float32))


def test_webp_is_lossless_and_animated():
    clip = RNG.integers(0, 256, (4, 16, 12, 3), dtype=np.uint8)
    file = Image.open(io.BytesIO(media.webp_bytes(clip, fps=8)))
    assert file.n_frames == 4 and file.info["loop"] == 0
    for f in range(4):
        file.seek(f)
        np.testing.assert_array_equal(np.asarray(file.convert("RGB")), clip[f])
    assert file.info["duration"] == 125
    assert len(media.webp_bytes(clip, quality=50)) < len(media.webp_bytes(clip)) / 2


def test_mp4_of_tiny_odd_frames(tmp_path):
    clip = np.zeros((5, 9, 7, 3), np.uint8)
    for f in range(5):
        clip[f] = (40 * f, 200, 255 - 40 * f)
    path = media.save_mp4(tmp_path / "x.mp4", clip, fps=8, size=63)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 8 and stream.codec_context.pix_fmt == "yuv420p"
    assert len(frames) == 5 and frames[0].shape == (82, 64, 3)  # 9 x 9 and 7 x 9, made even
    for frame, wanted in zip(frames, clip, strict=True):
        assert np.abs(frame.astype(int)[32, 32] - wanted[4, 3]).max() < 12


def test_grid_places_pictures_and_labels():
    images = RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    plain = media.grid(images, columns=2, gap=2)
    assert plain.shape == (22, 22, 3)
    np.testing.assert_array_equal(plain[2:10, 12:20], images[1])
    np.testing.assert_array_equal(plain[12:20, 2:10], images[2])
    labelled = media.grid(images, columns=3, labels=["one", "a very long caption", "x"], size=64)
    assert labelled.shape == (4 + 64 + 4 + 16, 3 * 68 + 4, 3)
    assert (labelled[-18:] < 128).any()  # ink under the pictures
    np.testing.assert_array_equal(labelled[4:68, 4:68], media.enlarge(images[0], 8))


def test_clip_layouts():
    clips = RNG.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    moving = media.clip_grid(clips, columns=2)
    assert moving.shape[0] == 3
    np.testing.assert_array_equal(moving[1, 4:12, 16:24], clips[1, 1])
    sheet = media.contact_sheet(clips)
    np.testing.assert_array_equal(sheet[16:24, 4:12], clips[1, 0])
    np.testing.assert_array_equal(sheet[16:24, 28:36], clips[1, 2])


def test_a_label_of_any_length_is_cut_quickly(monkeypatch):
    """By halves, once a clip; a line break is a space."""
    asked = []
    real = media._font()

    class Font:
        def getlength(self, text):
            asked.append(len(text))
            return real.getlength(text)

    fitted = media._fitted("a very long caption " * 5000, 60)
    assert fitted.startswith("a ver") and fitted.endswith("…") and real.getlength(fitted) <= 60
    longer = fitted[:-1] + "a very long caption"[len(fitted) - 1:][:2] + "…"
    assert real.getlength(longer) > 60
    assert media._fitted("two\nlines", 200) == "two lines" and media._fitted("wide", 3) == ""
    monkeypatch.setattr(media, "_font", lambda: Font())
    media._fitted("x" * 100_000, 60)
    assert len(asked) < 12 and max(asked) <= 241
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(media, "_fitted", lambda text, width: seen.append(text) or "x")
    media.clip_grid(np.zeros((1, 3, 8, 8, 3), np.uint8), labels=["long " * 9], size=64)
    assert len([text for text in seen if text != "x"]) == 1
