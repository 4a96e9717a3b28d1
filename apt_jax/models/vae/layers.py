"""Layers of the causal VAE, channels last: [B, F, H, W, C] throughout.

On an H100 the convolutions are all of the time (388 TFLOP for 49x720x1280), and their layout
decides it: cuDNN reaches the tensor cores without transposing only with channels last, in bfloat16.
XLA keeps channels last for two-dimensional convolutions alone; for a three-dimensional one it picks
channels first and transposes every activation before and after (seen in the program compiled for
an H100; not timed there). So the three taps in time are put side by side as channels, and all
convolutions are two-dimensional (form "frames"; also 1.4 to 4 times as fast on a CPU). Form "volume"
writes a third of the input; on a GPU compile it with `CHANNELS_LAST`.

What else matters: no pass over the activations but the convolutions and the fused norm-SiLU between
them; the zeros before the clip's first frame are not multiplied; what has one tap in space is a
matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.kernels.attention import attention
from apt_jax.models.vae.walk import Walk

_FAN_IN = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# compiler_options of jax.jit on a GPU: channels last for three-dimensional convolutions too
CHANNELS_LAST = {"xla_gpu_force_conv_nhwc": True}
SCORES = 2**26  # most attention scores at a time: 256 MiB of float32


class Kernel(nnx.Module):
    """Weights of a convolution: kernel [*window, d_in, d_out] and bias [d_out], float32."""

    def __init__(self, window: tuple[int, ...], d_in: int, d_out: int, *, dtype: jnp.dtype,
                 rngs: nnx.Rngs):
        self.kernel = nnx.Param(_FAN_IN(rngs.params(), (*window, d_in, d_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d_out,), jnp.float32))
        self.window, self.dtype = window, dtype

    def matmul(self, x: jax.Array) -> jax.Array:
        """x [..., taps * d_in] times the kernel with its window folded into the input channels."""
        kernel = self.kernel[...].astype(self.dtype)
        return x @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(self.dtype)


class Pointwise(Kernel):
    """A convolution of one tap: [..., d_in] -> [..., d_out]."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.matmul(x.astype(self.dtype))


class CausalConv(Kernel):
    """3x3x3 convolution, zero-padded in space, over a frame and its two predecessors."""

    def __init__(self, d_in: int, d_out: int, *, form: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__((3, 3, 3), d_in, d_out, dtype=dtype, rngs=rngs)
        self.form = form

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        height = (1, 1)
        if walk.rows is not None:
            x, height = walk.rows.halo(x, 1, 1), (0, 0)
        frames = x.shape[1]
        x, kernel = walk.with_past(x, 2), self.kernel[...].astype(self.dtype)
        if walk.first and frames == 1:  # an image: two of the three taps would see zeros
            y = _each_frame(x[:, -1:], kernel[-1], (height, (1, 1)))
        elif self.form == "frames":
            x = jnp.concatenate([x[:, i : i + frames] for i in range(3)], axis=-1)  # [.., 3 C]
            kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, -1, kernel.shape[-1])
            y = _each_frame(x, kernel, (height, (1, 1)))
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1, 1), ((0, 0), height, (1, 1)),
                dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
        return y + self.bias[...].astype(self.dtype)


class HalvingConv(Kernel):
    """3x3 convolution of every other place of each frame; zeros at the end, one row and column."""

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        height = (0, 1)
        if walk.rows is not None:
            x, height = walk.rows.halo(x, 0, 1), (0, 0)
        kernel = self.kernel[...].astype(self.dtype)
        return _each_frame(x, kernel, (height, (0, 1)), 2) + self.bias[...].astype(self.dtype)


class DoublingConv(Kernel):
    """3x3 convolution of each frame enlarged twofold (nearest), zero-padded.

    Of the nine taps some fall on the same small pixel, which ones depends on the place's parity:
    four 2x2 convolutions of the small frame, one for each parity, are the same in 16 / 36 of the
    products, and the enlarged frame is never written.
    """

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        height = (1, 1)
        if walk.rows is not None:
            x, height = walk.rows.halo(x, 1, 1), (0, 0)
        kernel = self.kernel[...].astype(jnp.float32)
        for axis in (0, 1):  # [3, 3, C, C'] -> [2, 3, 2, ..] -> [2, 2, 2, 2, C, C']: taps, parities
            first, middle, last = jnp.split(kernel, 3, axis=2 * axis)
            even = jnp.concatenate([first, middle + last], axis=2 * axis)
            odd = jnp.concatenate([first + middle, last], axis=2 * axis)
            kernel = jnp.stack([even, odd], axis=2 * axis + 1)
        c_in, c_out = kernel.shape[-2:]
        kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, c_in, 4 * c_out)
        kernel = kernel.astype(self.dtype)
        y = _each_frame(x, kernel, (height, (1, 1)))  # [B, F, H + 1, W + 1, 4 C']
        b, f, h, w = y.shape[0], y.shape[1], y.shape[2] - 1, y.shape[3] - 1
        y = y.reshape(b, f, h + 1, w + 1, 2, 2, c_out)
        rows = [jnp.stack([y[:, :, i : i + h, j : j + w, i, j] for j in (0, 1)], axis=4)
                for i in (0, 1)]  # each [B, F, H, W, 2, C']
        y = jnp.stack(rows, axis=3).reshape(b, f, 2 * h, 2 * w, c_out)
        return y + self.bias[...].astype(self.dtype)


def _each_frame(x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]],
                stride: int = 1) -> jax.Array:
    """Two-dimensional convolution of every frame: [B, F, H, W, C] -> [B, F, H', W', C']."""
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]), kernel, (stride, stride), padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(*x.shape[:2], *y.shape[1:])


class TimeConv(Kernel):
    """Three taps in time, one in space, as a matrix product: [B, 2 + F, ...] -> [B, F', ...]."""

    def __call__(self, x: jax.Array, stride: int) -> jax.Array:
        count = (x.shape[1] - 3) // stride + 1
        taps = [x[:, i : i + (count - 1) * stride + 1 : stride] for i in range(3)]
        return self.matmul(jnp.concatenate(taps, axis=-1))  # [B, F', H, W, 3 C] -> [.., d_out]


class Norm(nnx.Module):
    """x / |x| * sqrt(dim) * scale over the channels; float32 inside."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] in any dtype -> float32: the caller casts after its activation."""
        h = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(h * h, axis=-1, keepdims=True))
        return h * (math.sqrt(h.shape[-1]) / jnp.maximum(length, 1e-12)) * self.scale[...]

    def silu(self, x: jax.Array) -> jax.Array:
        """SiLU of the norm in x's dtype."""
        return jax.nn.silu(self(x)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, d_in: int, d_out: int, *, form: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = Norm(d_in)
        self.conv1 = CausalConv(d_in, d_out, form=form, dtype=dtype, rngs=rngs)
        self.norm2 = Norm(d_out)
        self.conv2 = CausalConv(d_out, d_out, form=form, dtype=dtype, rngs=rngs)
        if d_in != d_out:
            self.shortcut = Pointwise((1, 1, 1), d_in, d_out, dtype=dtype, rngs=rngs)
        self.changes = d_in != d_out

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        shortcut = self.shortcut(x) if self.changes else x
        h = self.conv1(self.norm1.silu(x), walk)
        return shortcut + self.conv2(self.norm2.silu(h), walk)


class FrameAttention(nnx.Module):
    """One head over all places of a frame; frames do not see each other."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = Norm(dim)
        self.qkv = Pointwise((1, 1), dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.out = Pointwise((1, 1), dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        b, f, h, w, c = x.shape
        qkv = self.qkv(self.norm(x).astype(x.dtype)).reshape(b * f, h * w, 3 * c)
        q, k, v = jnp.split(qkv, 3, axis=-1)  # [B F, H W, C]
        mask = None
        if walk.rows is not None:
            k, v = walk.rows.gather(k), walk.rows.gather(v)  # [B F, all of H W, C]
            if walk.rows.padded:
                mask = jnp.arange(k.shape[1]) < walk.rows.real * w
        y = attend(q, k, v, mask).reshape(b, f, h, w, c)
        return x + self.out(y)


def query_blocks(samples: int, queries: int, keys: int) -> int:
    """How many blocks of queries `attend` takes one after the other."""
    return min(max(1, -(-queries * samples * keys // SCORES)), queries)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """Attention of one head, a block of queries at a time so that few scores are alive.

    A head of 384 channels is beyond the flash kernels for GPUs; at 720p this is 1% of the VAE's work.

    Args: q [N, Q, C]; k, v [N, K, C]; key_mask bool [K] or None. Returns [N, Q, C].
    """
    n, queries, c = q.shape
    mask = None if key_mask is None else jnp.broadcast_to(key_mask, k.shape[:2])

    def block(q: jax.Array) -> jax.Array:  # [N, a few of Q, C]
        return attention(q[:, :, None], k[:, :, None], v[:, :, None], mask)[:, :, 0]

    count = query_blocks(n, queries, k.shape[1])
    if count == 1:
        return block(q)
    size = -(-queries // count)
    # All frames of a block of queries together: the batch may be sharded, and a loop over it would
    # gather it.
    q = jnp.pad(q, ((0, 0), (0, count * size - queries), (0, 0))).reshape(n, count, size, c)
    y = jax.lax.map(block, jnp.moveaxis(q, 1, 0))  # [count, N, size, C]
    return jnp.moveaxis(y, 0, 1).reshape(n, count * size, c)[:, :queries]


class Downsample(nnx.Module):
    """Halves height and width, and with `temporal` the frames after the first."""

    def __init__(self, dim: int, temporal: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = HalvingConv((3, 3), dim, dim, dtype=dtype, rngs=rngs)
        if temporal:
            self.time_conv = TimeConv((3, 1, 1), dim, dim, dtype=dtype, rngs=rngs)
        self.temporal = temporal

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        x = self.conv(x, walk)  # [B, F, H / 2, W / 2, C]
        if not self.temporal:
            return x
        if not walk.first:
            return self.time_conv(walk.with_past(x, 1), 2)  # [B, F / 2, ...]
        walk.new.append(x[:, -1:])
        if x.shape[1] == 1:
            return x
        return jnp.concatenate([x[:, :1], self.time_conv(x, 2)], axis=1)  # [B, 1 + (F - 1) / 2, ..]


class Upsample(nnx.Module):
    """Doubles height and width (nearest), and with `temporal` the frames after the first."""

    def __init__(self, dim: int, temporal: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        if temporal:
            self.time_conv = TimeConv((3, 1, 1), dim, 2 * dim, dtype=dtype, rngs=rngs)
        self.conv = DoublingConv((3, 3), dim, dim // 2, dtype=dtype, rngs=rngs)
        self.temporal = temporal

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        if self.temporal:
            x = self._double_frames(x, walk)
        return self.conv(x, walk)  # [B, F, 2 H, 2 W, C / 2]

    def _double_frames(self, x: jax.Array, walk: Walk) -> jax.Array:
        """[B, F, ...] -> [B, 2 F, ...]; the clip's first frame stays one, and out of the past."""
        head, x = (x[:, :1], x[:, 1:]) if walk.first else (x[:, :0], x)
        joined = walk.with_past(x, 2)
        if not x.shape[1]:
            return head
        b, f, h, w, c = x.shape
        y = self.time_conv(joined, 1).reshape(b, f, h, w, 2, c)
        y = y.transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * f, h, w, c)  # each frame becomes two
        return jnp.concatenate([head, y], axis=1)
