"""Picture features for every distance here: torchvision's ImageNet MobileNetV2 in JAX.

Sandler et al., "MobileNetV2" (CVPR 2018), table 2. Only the feature layers: 1280 channels, averaged
over space. BatchNorm (eps 1e-5) is folded into the convolutions by launch/convert_mobilenet.py, so
a layer is a kernel and a bias. Frames go in at 96 px: antialiased bicubic (`jax.image.resize`,
method "cubic", the same kernel as Pillow's and torch's antialiased bicubic), clipped to [0, 1],
then ImageNet's mean and standard deviation. Distances on these features are called FD-MobileNetV2;
they are not FID.

A depthwise 3x3 convolution is nine shifted multiply-adds here: XLA's CPU compiler fuses them into
one vectorised loop, which made the whole network 12 times faster on two cores than a grouped
convolution (1,200 against 100 images a second at 96 px).
"""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from apt_jax.errors import UserError
from apt_jax.eval.progress import Progress
from apt_jax.parallel.flags.options import cpu_options

ASSET = Path(__file__).parent.parent / "assets" / "mobilenet_v2_features.safetensors"
BATCH_NORM_EPS = 1e-5
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FEATURES = 1280
INPUT_SIZE = 96

# (expansion, channels out, repeats, stride of the first): table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
          (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class Layer(NamedTuple):
    """One inverted residual: 1x1 expansion (or none), 3x3 depthwise, 1x1 projection."""

    expand: bool
    stride: int
    residual: bool


def layer_plan() -> list[Layer]:
    """The 17 inverted residual blocks in forward order."""
    plan, width = [], 32
    for expansion, channels, repeats, stride in STAGES:
        for i in range(repeats):
            step = stride if i == 0 else 1
            plan.append(Layer(expansion != 1, step, step == 1 and width == channels))
            width = channels
    return plan


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 6.0)


def _pointwise(x: jax.Array, layer: dict) -> jax.Array:
    # HIGHEST: a GPU would otherwise round to TF32 and the distance would depend on the machine.
    return jnp.dot(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]


def _depthwise(x: jax.Array, layer: dict, stride: int) -> jax.Array:
    """3x3 depthwise convolution, padding 1, as nine shifted multiply-adds (see the module)."""
    n, height, width, channels = x.shape
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = layer["bias"]
    for i in range(3):
        for j in range(3):
            end = (n, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels)
            shifted = jax.lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))
            out = out + layer["kernel"][i, j] * shifted
    return out  # [N, rows, columns, channels]


def forward(params: dict, x: jax.Array) -> jax.Array:
    """Features of normalised pictures.

    params: nested dict as `load_params` gives; x float32 [N, H, W, 3] -> float32 [N, 1280].
    """
    stem = params["stem"]
    x = _relu6(jax.lax.conv_general_dilated(
        x, stem["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST) + stem["bias"])  # [N, H/2, W/2, 32]
    for number, layer in enumerate(layer_plan(), start=1):
        block = params[f"block{number:02d}"]
        y = _relu6(_pointwise(x, block["expand"])) if layer.expand else x
        y = _relu6(_depthwise(y, block["depthwise"], layer.stride))
        y = _pointwise(y, block["project"])
        x = x + y if layer.residual else y
    return _relu6(_pointwise(x, params["head"])).mean((1, 2))  # [N, 1280]


def preprocess(frames: jax.Array) -> jax.Array:
    """uint8 [N, H, W, 3] -> float32 [N, 96, 96, 3], resized and normalised as the module says."""
    x = frames.astype(jnp.float32) / 255.0
    shape = (frames.shape[0], INPUT_SIZE, INPUT_SIZE, 3)
    x = jax.image.resize(x, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
    x = jnp.clip(x, 0.0, 1.0)
    return (x - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)


@functools.cache
def load_params() -> dict:
    """The shipped weights as a nested dict of float32 numpy arrays."""
    nested: dict = {}
    for name, value in load_file(ASSET).items():
        *path, leaf = name.split("/")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return nested


@functools.cache
def identity() -> str:
    """What makes features comparable: a hash of the weights and of how frames are prepared."""
    digest = hashlib.sha256(ASSET.read_bytes())
    digest.update(f"cubic antialias {INPUT_SIZE} {IMAGENET_MEAN} {IMAGENET_STD}".encode())
    return digest.hexdigest()


@functools.cache
def _features():
    """(params, frames) -> features, compiled; made when first asked for, as it asks for the device."""
    return jax.jit(lambda params, frames: forward(params, preprocess(frames)),
                   compiler_options=cpu_options(jax.default_backend()) or None)


class MobileNetFeatures:
    """Callable: frames uint8 [N, H, W, 3] -> features float32 [N, 1280] (numpy, on the host).

    Works in batches of one fixed size (the last one padded), so each frame size compiles once.
    `rate` holds the frames per second of the last call. Raises UserError for other dtypes or
    shapes.
    """

    def __init__(self, batch: int = 0):
        # 16 was the fastest on two CPU cores (the activations stay in cache); an accelerator
        # wants more at once.
        self.batch = batch or (16 if jax.default_backend() == "cpu" else 256)
        self.params = jax.device_put(load_params())
        self.rate = 0.0

    def __call__(self, frames: np.ndarray, label: str = "") -> np.ndarray:
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(
                f"features need uint8 frames [N, H, W, 3], got {frames.dtype} {frames.shape}; "
                "convert with apt_jax.media.to_uint8")
        out = np.empty((len(frames), FEATURES), np.float32)
        with Progress(len(frames), label, "frames") as progress:
            for start in range(0, len(frames), self.batch):
                part = frames[start:start + self.batch]
                padding = [(0, self.batch - len(part))] + [(0, 0)] * 3
                result = _features()(self.params, np.pad(part, padding))
                out[start:start + len(part)] = np.asarray(result)[:len(part)]
                progress.advance(len(part))
        self.rate = progress.rate
        return out
