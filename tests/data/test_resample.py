"""Frames by time: rates up and down, changing rates, seeking, colours, archives' members."""

import dataclasses
import fractions

import numpy as np
import pytest
import tiny_media as tiny

from apt_jax.data import decode, resample
from apt_jax.data.cutting import plan_latents, windows
from apt_jax.data.settings import Settings
from apt_jax.data.sources import Item


def numbers(file, start, rate, count):
    """Which of the grey frames i * 20 were taken."""
    frames = resample.read_clip(file, start, rate, count, 16, 16)
    assert frames.shape == (count, 16, 16, 3) and frames.dtype == np.uint8
    return [round(float(f.mean()) / 20) for f in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mov", ".mkv"])
def test_rates_up_and_down(tmp_path, suffix):
    """mkv and webm keep times in ms: a frame must not be missed by half of one."""
    path = tmp_path / f"a{suffix}"
    tiny.save_video(path, 12, rate=30)
    media = decode.probe(path)
    assert (media.frames, media.fps, media.seconds) == (12, 30, pytest.approx(0.4))
    assert numbers(path, 0, 30, 12) == list(range(12))
    assert numbers(path, 0, 24, 9) == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert numbers(path, 0.1, 15, 4) == [3, 5, 7, 9]
    assert numbers(path, 0, 60, 7) == [0, 0, 1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="ends after 5 of 6"):
        numbers(path, 0.2, 20, 6)


@pytest.mark.parametrize("rate", [23.976, 24, 25, 29.97, 50, 59.94])
def test_common_rates_to_24_never_stall_or_jump(tmp_path, rate):
    path = tmp_path / "a.mkv"
    tiny.save_video(path, 13, rate=fractions.Fraction(round(rate * 1000), 1000))
    count = int(decode.probe(path).seconds * 24 + 1e-3)
    found = numbers(path, 0, 24, count)
    assert found == [int(i * rate / 24 + 0.1) for i in range(count)]


def test_a_changing_rate(tmp_path):
    """Frames at 0, 1, 2, 5, 6 and 10 tenths of a second."""
    import av

    path, shown = tmp_path / "a.mp4", [0, 1, 2, 5, 6, 10]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 10)
        for i, pts in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 48, 3), i * 20, np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, fractions.Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers(path, 0, 10, 11) == [0, 1, 2, 2, 2, 3, 4, 4, 4, 4, 5]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
@pytest.mark.parametrize("packed", ["file", "member", "blob"])
def test_seeking_finds_the_frames_that_decoding_from_the_start_does(tmp_path, suffix, packed):
    path = tmp_path / f"a{suffix}"
    tiny.save_video(path, 120, rate=20)
    file = {
        "file": path,
        "member": decode.Member(path.name, tmp_path / "tar", 1000, path.stat().st_size),
        "blob": decode.Blob(path.name, path.read_bytes()),
    }[packed]
    (tmp_path / "tar").write_bytes(b"x" * 1000 + path.read_bytes() + b"y" * 1000)
    whole = resample.read_clip(file, 0, 20, 120, 16, 16)
    for start in (1.0, 2.5, 4.95, 5.5):
        first = round(start * 20)
        part = resample.read_clip(file, start, 20, 10, 16, 16)
        np.testing.assert_array_equal(part, whole[first : first + 10])


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_animations_have_times_too(tmp_path, name):
    tiny.save_animation(tmp_path / name, 10, duration=100)
    media = decode.probe(tmp_path / name)
    assert media.seconds == pytest.approx(1.0)
    assert numbers(tmp_path / name, 0, 5, 5) == [0, 2, 4, 6, 8]
    assert numbers(tmp_path / name, 0.3, 20, 5) == [3, 3, 4, 4, 5]


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.png"])
def test_animations_whose_frames_stay_for_different_times(tmp_path, name):
    """A second, then nine tenths: one rate for all would show the first frame's for ten seconds."""
    tiny.save_animation(tmp_path / name, 10, duration=[1000] + [100] * 9)
    media = decode.probe(tmp_path / name)
    assert (media.frames, media.seconds) == (10, pytest.approx(1.9))
    assert media.fps == pytest.approx(10 / 1.9)
    assert numbers(tmp_path / name, 0, 5, 9) == [0, 0, 0, 0, 0, 1, 3, 5, 7]
    assert numbers(tmp_path / name, 0.95, 20, 4) == [0, 1, 1, 2]
    clips = Settings(sizes=((16, 16),), frames=(1, 9), fps=10.0, clips=0, holdout=0.0)
    found = plan_latents(Item("a", "", "a"), dataclasses.asdict(media), clips)
    assert [(p.bucket[1], p.start) for p in found] == [(9, 0.0), (9, 1.0)]  # 19 frames in all


def test_images_and_rotated_films(tmp_path):
    tiny.save_image(tmp_path / "a.png", 3)
    np.testing.assert_array_equal(
        resample.read_clip(tmp_path / "a.png", 0, 0, 1, 24, 24)[0], tiny.picture(3))
    tiny.save_video(tmp_path / "a.mp4", 4, height=32, width=48, rotation=90)
    assert (decode.probe(tmp_path / "a.mp4").height, decode.probe(
        tmp_path / "a.mp4").width) == (48, 32)
    np.testing.assert_array_equal(
        resample.read_clip(tmp_path / "a.mp4", 0, 10, 4, 48, 32),
        decode.read(tmp_path / "a.mp4", [0, 1, 2, 3], 48, 32))


@pytest.mark.parametrize("height, matrix", [(480, "ITU601"), (720, "ITU709")])
def test_colours_of_films_that_do_not_say(tmp_path, height, matrix):
    """Red comes back red where it was encoded with the matrix that players assume."""
    import av

    red = np.zeros((height, 64, 3), np.uint8)
    red[..., 0] = 200
    frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=matrix)
    frame.colorspace = 2  # unspecified
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == 2
    for found in (resample.read_clip(tmp_path / "a.mp4", 0, 10, 1, height, 64),
                  decode.read(tmp_path / "a.mp4", [0], height, 64)):
        assert np.abs(found[0].mean((0, 1)) - [200, 0, 0]).max() < 6


def test_windows_lie_in_the_middle_of_equal_parts():
    assert windows(100, 49) == [1, 51] and windows(100, 49, 1) == [26]
    assert windows(49, 49) == [0] and windows(147, 49) == [0, 49, 98]
    for available in range(1, 120):
        for count in range(1, available + 1):
            for most in (0, 1, 3):
                found = windows(available, count, most)
                assert len(found) == min(available // count, most or available)
                assert found[0] >= 0 and found[-1] + count <= available
                assert all(b - a >= count for a, b in zip(found, found[1:]))


SETTINGS = Settings(sizes=((480, 832), (832, 480)), image_sizes=((1024, 1024),), frames=(1, 49),
                    fps=24.0, clips=0, holdout=0.0)


def plans(settings=SETTINGS, **row):
    row = {"frames": 300, "height": 1080, "width": 1920, "fps": 30.0, "seconds": 10.0} | row
    found = plan_latents(Item("a", "", "a"), row, settings)
    return found if isinstance(found, str) else [
        (p.bucket[1:], round(p.start * 24, 3), p.fps) for p in found]


def test_the_rule_on_a_ten_second_film():
    """240 frames at 24 a second: four windows, one in the middle of each 60."""
    clip = (49, 480, 832)
    assert plans() == [(clip, start, 24.0) for start in (6, 66, 126, 186)]
    assert plans(dataclasses.replace(SETTINGS, clips=1)) == [(clip, 96, 24.0)]
    assert plans(height=1920, width=1080)[0][0] == (49, 832, 480)
    assert plans(seconds=2.0, frames=60) == [((1, 1024, 1024), 24, 0.0)]  # 48: an image
    assert plans(frames=1, seconds=0.0, fps=0.0) == [((1, 1024, 1024), 0, 0.0)]
    assert "shortest clip (49)" in plans(dataclasses.replace(SETTINGS, frames=(49,)), seconds=2.0)
    assert "min_fps = 31" in plans(dataclasses.replace(SETTINGS, min_fps=31.0))
    small = dataclasses.replace(SETTINGS, max_enlarge=1.5)
    assert "enlarged 2.00 times" in plans(small, height=240, width=416)
    assert plans(small, height=400, width=640)[0][0] == clip
    own = plans(dataclasses.replace(SETTINGS, fps=0.0))
    assert len(own) == 6 and own[0][2] == 30.0
    assert len(plans(seconds=36000.0, frames=3)) == 3  # of windows not more than frames
    even = plans(dataclasses.replace(SETTINGS, sampling="even"))
    assert even == [(clip, 0, pytest.approx(4.9))]


def test_a_last_frame_that_stays_is_shown_as_long_as_it_says(tmp_path):
    """Two seconds of 20 frames, then one that stays for three."""
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        packets = []
        for i in range(41):
            array = np.full((32, 48, 3), i * 5, np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24"))
        packets += stream.encode()
        packets[-1].duration = round(3 / packets[-1].time_base)
        for packet in packets:
            container.mux(packet)
    assert decode.probe(path).seconds == pytest.approx(5, abs=0.06)
    found = resample.read_clip(path, 0, 16, 79, 32, 48).mean((1, 2, 3)) / 5
    np.testing.assert_allclose(found[32:], 40, atol=0.5)
    with pytest.raises(ValueError, match="ends after"):
        resample.read_clip(path, 0, 16, 83, 32, 48)
