"""Every kind of file: how long it is, which frames come out, orientation and transparency."""

import fractions

import numpy as np
import pytest
import tiny_media as tiny
from PIL import Image

from apt_jax.data import decode, reasons, resample


def grey(frames):
    return [int(round(f.mean() / 20)) for f in frames]


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.mp4", "a.webm"])
def test_chosen_frames_of_moving_files(tmp_path, name):
    path = tmp_path / name
    if path.suffix in decode.VIDEOS:
        tiny.save_video(path, 10, rate=20)
    else:
        tiny.save_animation(path, 10, height=32, width=48, duration=50)
    media = decode.probe(path)
    assert (media.frames, media.height, media.width) == (10, 32, 48)
    assert media.fps == pytest.approx(20, rel=0.01)
    frames = decode.read(path, [0, 3, 4, 9], 16, 16)
    assert frames.shape == (4, 16, 16, 3) and frames.dtype == np.uint8
    assert grey(frames) == [0, 3, 4, 9]
    with pytest.raises(ValueError, match="only 1 of 2"):
        decode.read(path, [9, 10], 16, 16)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_images(tmp_path, name):
    tiny.save_image(tmp_path / name, 3, 20, 30)
    assert decode.probe(tmp_path / name) == decode.Media(1, 20, 30, 0.0)
    frames = decode.read(tmp_path / name, [0], 20, 30)
    assert np.abs(frames[0].astype(int) - tiny.picture(3, 20, 30)).mean() < 8


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    tiny.save_image(tmp_path / "a.jpg", 0, 20, 30, exif=exif, quality=100)
    media = decode.probe(tmp_path / "a.jpg")
    assert (media.height, media.width) == (30, 20)
    frame = decode.read(tmp_path / "a.jpg", [0], 30, 20)[0]
    want = np.rot90(tiny.picture(0, 20, 30), -1)
    assert np.abs(frame.astype(int) - want).mean() < 8


def test_video_rotation(tmp_path):
    """Stored with a white upper half and a quarter turn: shown, the white half is at one side."""
    tiny.save_video(tmp_path / "a.mp4", 3, 32, 48, rotation=90)
    media = decode.probe(tmp_path / "a.mp4")
    assert (media.height, media.width) == (48, 32)
    frame = decode.read(tmp_path / "a.mp4", [0], 48, 32)[0].astype(int)
    left, right = frame[:, :14].mean(), frame[:, 18:].mean()
    assert left > 200 and right < 50  # turned 90 degrees counterclockwise: the top goes left


def test_transparency_is_laid_over_the_background(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = decode.read(tmp_path / "a.png", [0], 8, 8, (0, 0, 255))[0]
    assert frame[0, 0].tolist() == [255, 0, 0] and frame[7, 0].tolist() == [0, 0, 255]


def test_grey_of_sixteen_bits_keeps_its_values(tmp_path):
    ramp = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    want = np.repeat(np.rint(ramp / 257)[..., None], 3, -1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    Image.fromarray(ramp).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")  # what Pillow would clip to white
    frame = decode.read(tmp_path / "a.png", [0], 30, 20)[0]
    np.testing.assert_array_equal(frame, np.rot90(want, -1))
    # one grey that stands for transparency, and older Pillow's mode of 32 bits
    Image.fromarray(ramp).save(tmp_path / "b.png", transparency=int(ramp[0, 5]))
    frame = decode.read(tmp_path / "b.png", [0], 20, 30, (1, 2, 3))[0]
    assert frame[0, 5].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(frame[1:], want[1:])
    wide = Image.fromarray(ramp.astype(np.int32))
    np.testing.assert_array_equal(np.asarray(decode.flatten(wide, (0, 0, 0))), want)
    for values in (ramp.astype(np.int32) - 1, ramp.astype(np.int32) + 1, ramp.astype(np.float32)):
        with pytest.raises(ValueError, match="not 16-bit grey"):
            decode.flatten(Image.fromarray(values), (0, 0, 0))


def test_fit_crops_the_centre():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert decode.fit(Image.fromarray(image), 10, 10).min() == 255


def test_tags_that_are_not_utf8_do_not_cost_the_film(tmp_path):
    path = tmp_path / "a.mkv"
    tiny.save_video(path, 3)
    data = path.read_bytes()
    assert data.count(b"Lavf") > 0
    path.write_bytes(data.replace(b"Lavf", b"caf\xe9"))
    assert decode.probe(path).frames == 3
    assert decode.read(path, [2], 16, 16).shape == (1, 16, 16, 3)
    assert resample.read_clip(path, 0, 10, 3, 16, 16).shape == (3, 16, 16, 3)


def test_reasons_are_the_same_on_every_run(tmp_path):
    """No addresses, no paths: what was left out is counted by its reason, and bytes are kept."""
    found = set()
    for file in (decode.Blob("a.png", b"x" * 99), decode.Blob("b.png", b"y" * 99)):
        with pytest.raises(OSError) as caught:
            decode.probe(file)
        found.add(reasons.skipped("a", caught.value))
    assert found == {reasons.Skipped("a", "UnidentifiedImageError: no picture of a known format")}
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        decode.probe(tmp_path / "a.mp4")
    reason = reasons.skipped("a", caught.value).reason
    assert reason == "InvalidDataError: Invalid data found when processing input"
    text = reasons.skipped("a", ValueError(f"cannot read {object()!r}")).reason
    assert text == "ValueError: cannot read <object>"


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_an_animation_that_is_cut_short_is_damaged(tmp_path, name):
    """Its first frames decode, and the middle one of them would stand for the file."""
    images = [Image.fromarray(tiny.picture(i)) for i in range(6)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=100)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(OSError, match="truncated") as caught:
        decode.probe(tmp_path / name)
    assert not reasons.passes(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.mp4", "a.webp", "a.webm"])
def test_rubbish_raises(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no picture" * 20)
    with pytest.raises(Exception):  # noqa: B017 each decoder has its own
        decode.probe(tmp_path / name)


def test_a_jpeg_with_a_second_picture_is_its_first_upright(tmp_path):
    """A preview, or the other eye's picture, makes no clip of a photograph."""
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = (Image.fromarray(tiny.picture(n, 20, 30)) for n in (0, 3))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], exif=exif, quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
    assert decode.probe(tmp_path / "a.jpg") == decode.Media(1, 30, 20, 0.0)
    want = np.rot90(tiny.picture(0, 20, 30), -1)
    for frame in (decode.read(tmp_path / "a.jpg", [0], 30, 20)[0],
                  resample.read_clip(tmp_path / "a.jpg", 0, 0, 1, 30, 20)[0]):
        assert np.abs(frame.astype(int) - want).mean() < 8


def test_the_still_of_an_animated_png_is_no_frame_of_it(tmp_path):
    still, *frames = (Image.fromarray(np.full((8, 8, 3), 20 * n, np.uint8)) for n in (9, 1, 2, 3))
    still.save(tmp_path / "a.png", save_all=True, append_images=frames, default_image=True,
               duration=100)
    assert decode.probe(tmp_path / "a.png") == decode.Media(3, 8, 8, 10.0, pytest.approx(0.3))
    assert grey(decode.read(tmp_path / "a.png", [0, 1, 2], 8, 8)) == [1, 2, 3]
    assert grey(resample.read_clip(tmp_path / "a.png", 0, 10, 3, 8, 8)) == [1, 2, 3]


def film(path, times, stretch=None, size=(64, 48), **options):
    """Frame i, flat grey i * 20, at times[i] thousandths of a second."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        if stretch:
            stream.sample_aspect_ratio = stretch
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), i * 20 % 256, np.uint8),
                                               format="rgb24")
            frame.pts, frame.time_base = time, fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_film_in_fragments_has_the_frames_of_all(tmp_path):
    film(tmp_path / "a.mp4", range(0, 1200, 50), movflags="frag_keyframe")
    media = decode.probe(tmp_path / "a.mp4")
    assert media.frames == 24 and media.seconds == pytest.approx(1.2, abs=0.06)
    assert media.fps == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_film_that_slows_down_is_as_long_as_it_is_seen(tmp_path, name):
    """20 frames in a second, then ten more of one second each."""
    film(tmp_path / name, [*range(0, 1000, 50), *range(1000, 11000, 1000)])
    media = decode.probe(tmp_path / name)
    assert media.frames == 30 and 10 < media.seconds < 11.1
    assert media.fps == pytest.approx(30 / media.seconds)


def test_pixels_that_are_not_square_are_shown_as_they_are_meant(tmp_path):
    film(tmp_path / "a.mp4", [0, 50], stretch=fractions.Fraction(16, 9))
    media = decode.probe(tmp_path / "a.mp4")
    assert (media.height, media.width) == (48, 114)
    left = decode.read(tmp_path / "a.mp4", [1], 48, 114)
    np.testing.assert_array_equal(left, resample.read_clip(tmp_path / "a.mp4", 0.05, 20, 1, 48, 114))
    assert left.shape == (1, 48, 114, 3) and grey(left) == [1]
