"""Which kernel computes an attention: by name, hardware, dtype, shape and derivatives.

Every kernel says what it cannot do (`refusal`). A kernel that the config names and that cannot
serve is an error with that reason; "auto" takes the first that can, and logs its choice once.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apt_jax.errors import UserError
from apt_jax.kernels import choice, cudnn_fp8, hopper, peers, scope
from apt_jax.kernels.choice import BACKENDS, Hardware
from apt_jax.kernels.flash.attention import flash_attention, flash_gradients, rowsum
from apt_jax.kernels.oracle import oracle
from apt_jax.kernels.xla import xla

log = logging.getLogger("apt_jax")

# With fewer queries there is no tile to fill, and scores are few: always plain JAX, so also for the
# discriminator's one query, which cuDNN refuses. So where there is no key at all.
FEW_QUERIES = 16
# "auto" leaves attention this small to XLA, which fuses it.
SMALL_SCORES = 256 * 256
# In float32 the GPU kernels multiply outside the tensor cores: "auto" takes them to save memory only.
LARGE_SCORES = 2**28
# These compute from scores in memory, in plain JAX.
PLAIN = ("oracle", "xla")
HALF = (jnp.bfloat16, jnp.float16)
# So much of its own length a stream is padded by for a kernel's tiles: its padding goes through every
# product of a layer, where what a kernel adds by itself goes through attention alone.
PADDING = 1 / 32


@dataclasses.dataclass(frozen=True)
class Request:
    """One attention, as far as it decides the kernel."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: jnp.dtype
    uniform: bool  # q, k and v have one dtype
    derivatives: int
    hardware: Hardware

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array) -> Request:
        return cls(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], jnp.dtype(q.dtype),
                   q.dtype == k.dtype == v.dtype, choice.current().derivatives, choice.hardware())

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.queries * self.keys


def refusal(backend: str, r: Request) -> str | None:
    """Why this kernel cannot serve the request, None if it can."""
    if backend == "oracle":
        return None
    if r.derivatives > 1 and backend != "xla":
        return "it can be differentiated once, and this needs a second derivative"
    if not r.uniform:
        return "q, k and v have different dtypes"
    return _REFUSALS[backend](r)


def _xla(r: Request) -> str | None:
    return None


def _pallas(r: Request) -> str | None:
    if r.hardware.platform == "tpu":
        return f"it is written for GPUs, and this is a {r.hardware.name}; 'splash' is for TPUs"
    if r.hardware.platform == "gpu" and r.hardware.capability < 8:
        return ("it needs an NVIDIA GPU of compute capability 8.0 or newer, and this is a "
                f"{r.hardware.name}")
    if r.dtype not in (*HALF, jnp.float32):
        return f"it has no {r.dtype}"
    if r.head_dim > 256:
        return f"heads of {r.head_dim} channels are more than its 256"
    return None


def _hopper(r: Request) -> str | None:
    if r.hardware.platform == "tpu" or r.hardware.platform == "gpu" and r.hardware.capability != 9.0:
        return f"it is a kernel for Hopper GPUs, and this is a {r.hardware.name}"
    if r.hardware.platform == "cpu" and len(os.sched_getaffinity(0)) < 2:
        return "on a CPU an interpreter runs it, which waits for ever on one core; give it two"
    if r.dtype not in HALF:
        return f"it has no {r.dtype}; set model.dtype to 'bfloat16'"
    if r.head_dim not in hopper.HEADS:
        return f"its heads have {' or '.join(map(str, hopper.HEADS))} channels, not {r.head_dim}"
    return None


@functools.cache
def _no_tokamax() -> str | None:
    """Why tokamax cannot be used; None where it can. Installed is not enough: some versions lack a
    package that they import, or do not run with this jax."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed; run: pip install 'apt_jax[tokamax]'"
    try:
        importlib.import_module("tokamax")
    except Exception as error:
        return (f"tokamax cannot be imported ({type(error).__name__}: {error}); install what it lacks, "
                "or uninstall it")
    return None


def _tokamax(r: Request) -> str | None:
    if r.hardware.platform != "gpu" or r.hardware.capability != 9.0:
        return f"it is a kernel for Hopper GPUs, and this is a {r.hardware.name}"
    if reason := _no_tokamax():
        return reason
    if r.dtype not in HALF:
        return f"it has no {r.dtype}; set model.dtype to 'bfloat16'"
    if r.head_dim % 32 or r.head_dim > 256:
        return f"its heads are multiples of 32 up to 256 channels, not {r.head_dim}"
    return None


def _cudnn(r: Request) -> str | None:
    if r.hardware.platform != "gpu" or r.hardware.capability < 8:
        return ("it needs an NVIDIA GPU of compute capability 8.0 or newer, and this is a "
                f"{r.hardware.name}")
    if r.dtype not in HALF:
        return f"it has no {r.dtype}; set model.dtype to 'bfloat16'"
    if r.head_dim % 8 or r.head_dim > 128:
        return f"its heads are multiples of 8 up to 128 channels, not {r.head_dim}"
    return None


def _cudnn_fp8(r: Request) -> str | None:
    if r.hardware.platform == "tpu" or r.hardware.platform == "gpu" and r.hardware.capability < 9:
        return ("it needs an NVIDIA GPU of compute capability 9.0 or newer, and this is a "
                f"{r.hardware.name}")
    if r.head_dim > cudnn_fp8.HEAD_DIM:
        return f"its heads have up to {cudnn_fp8.HEAD_DIM} channels, not {r.head_dim}"
    if r.hardware.platform == "gpu" and not cudnn_fp8.available():
        return f"jax {jax.__version__} does not have it"
    return None


def _splash(r: Request) -> str | None:
    if r.hardware.platform == "gpu":
        return f"it is a kernel for TPUs, and this is a {r.hardware.name}"
    if r.head_dim % 64:
        return f"its heads are multiples of 64 channels, not {r.head_dim}"
    return None


_REFUSALS: dict[str, Callable[[Request], str | None]] = {
    "xla": _xla, "pallas": _pallas, "hopper": _hopper, "tokamax": _tokamax, "cudnn": _cudnn,
    "cudnn_fp8": _cudnn_fp8, "splash": _splash}


def select(backend: str, r: Request, *, tell: bool = True) -> str:
    """The kernel that serves a request, never "auto". UserError where a named one cannot.

    tell: log what "auto" took.
    """
    if backend not in BACKENDS:
        raise UserError(f"model.attention = {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend != "auto":
        few = r.queries < FEW_QUERIES or not r.keys
        # Few queries, such as D's one, never reach the kernel: their heads may be of any size.
        reason = refusal(backend, dataclasses.replace(r, head_dim=64) if few else r)
        if reason:
            raise UserError(f"model.attention = {backend!r} cannot serve this: {reason}; 'auto' "
                            "takes what can")
        return "oracle" if few else backend
    found = _automatic(r)
    if tell and r.hardware.platform != "cpu":  # there is nothing to choose on a CPU
        _note(found, r.hardware.name, str(r.dtype), r.head_dim)
    return found


def _automatic(r: Request) -> str:
    if r.queries < FEW_QUERIES or not r.keys or r.derivatives > 1:
        return "oracle"
    if r.hardware.platform == "cpu":
        return "oracle" if refusal("xla", r) else "xla"
    if r.queries * r.keys <= SMALL_SCORES:
        return "oracle"
    if r.dtype == jnp.float32 and r.scores <= LARGE_SCORES and r.hardware.platform == "gpu":
        return "oracle"
    order = {"gpu": ("tokamax", "pallas"), "tpu": ("splash",)}.get(r.hardware.platform, ())
    return next((name for name in order if refusal(name, r) is None), "oracle")


@functools.cache
def _note(backend: str, hardware: str, dtype: str, head_dim: int) -> None:
    log.info("attention on %s: %s (%s, heads of %d)", hardware, backend, dtype, head_dim)


_SEEN: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def recording() -> Iterator[set[str]]:
    """The kernels that attention traced inside is given; few queries aside, which never have one."""
    seen: set[str] = set()
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def _record(backend: str, r: Request) -> None:
    seen = _SEEN.get()
    if seen is not None and r.queries >= FEW_QUERIES:
        seen.add(backend)


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None) -> None:
    """UserError where the arrays of an attention do not belong together: plain JAX would broadcast
    them, and a kernel read beyond their end."""
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise UserError(f"queries {q.shape} and keys {k.shape} do not fit: attention wants [batch, "
                        "tokens, heads, channels] that differ in tokens only")
    if v.shape != k.shape:
        raise UserError(f"values {v.shape} and keys {k.shape} do not fit: attention wants one shape")
    if key_mask is not None and (key_mask.shape, key_mask.dtype) != (k.shape[:2], jnp.bool_):
        raise UserError(f"the mask {key_mask.dtype} {key_mask.shape} does not fit: attention wants "
                        f"bool {k.shape[:2]}, one of each key")


class Whole(NamedTuple):
    """The tokens that a kernel computes with.

    queries, keys: their counts in whole tiles, or as asked for where that is more than PADDING away.
    lengths: it is told the number of visible keys, which come first; False: a mask, in any order.
    """

    queries: int
    keys: int
    lengths: bool


# How many queries or keys a kernel computes with. 'pallas' and plain JAX take any number; eight-bit
# attention writes its padding with the rounding, in one pass.
_TILES: dict[str, Callable[[int], int]] = {
    "hopper": lambda count: hopper.TILE, "tokamax": lambda count: peers.TOKAMAX_TILE,
    "cudnn": lambda count: peers.CUDNN_TILE, "splash": peers.splash_tile}


def whole(batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: jnp.dtype) -> Whole:
    """What the kernel in force makes of an attention of these sizes, asked before the layers.

    A network that pads its streams to it and, for `lengths`, keeps hidden keys last and says so
    (`hidden_last`), spares every layer doing so. Nothing is asked of it where tokens are cut over
    devices: their pieces are joined device by device, and what is last there is not last here.
    """
    mesh = scope.current()
    if mesh is not None and not mesh.whole:
        return Whole(queries, keys, False)
    backend = select(choice.current().backend, Request(
        batch, queries, keys, heads, head_dim, jnp.dtype(dtype), True, choice.current().derivatives,
        choice.hardware()), tell=False)  # on a mesh the layers ask for a device's part

    def filled(count: int) -> int:
        more = -count % _TILES[backend](count) if backend in _TILES else 0
        return count + more if more <= PADDING * count else count

    return Whole(filled(queries), filled(keys), backend in ("hopper", "tokamax", "cudnn"))


@jax.named_scope("attention")  # plan/flops.py tells its products from the others by this name
def run(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None, *,
        hidden_last: bool = False) -> jax.Array:
    """Attention on one device by the kernel in force; see `kernels.attention.attention`."""
    check_shapes(q, k, v, key_mask)
    r = Request.of(q, k, v)
    backend = select(choice.current().backend, r)
    _record(backend, r)
    interpret = r.hardware.platform == "cpu"
    if backend == "pallas":
        return flash_attention(q, k, v, key_mask, interpret=interpret)[0]
    if backend == "hopper":  # its language is imported where it is asked for
        from apt_jax.kernels.hopper.attention import hopper as kernel

        return kernel(q, k, v, key_mask, hidden_last=hidden_last, interpret=interpret)
    if backend == "splash":
        return peers.splash(q, k, v, key_mask, hidden_last=hidden_last, interpret=interpret)
    if backend == "cudnn_fp8":
        return cudnn_fp8.cudnn_fp8(q, k, v, key_mask, emulate=interpret)
    if backend in ("tokamax", "cudnn"):
        return getattr(peers, backend)(q, k, v, key_mask, hidden_last=hidden_last)
    return (xla if backend == "xla" else oracle)(q, k, v, key_mask)


# -- one block of keys, for those who put a softmax together from its parts ------------------------


class Blocks(NamedTuple):
    """Attention to one block of keys by our own kernels (the others keep their log-sum-exp).

    forward(q, k, v, key_mask) -> out like q, log-sum-exp float32 [B, heads, Nq]; a row without a
      key has zeros and -1e20.
    backward(q, k, v, key_mask, out, lse, dout) -> (dq, dk, dv); out, lse and dout are those of the
      whole rows, of which this block is a part.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> Blocks | None:
    """The kernels for blocks of such arrays, None where plain JAX is the choice.

    Ask while the network is traced; the functions themselves depend on nothing but their arguments.
    """
    r = Request.of(q, k, v)
    if select(choice.current().backend, r) in (*PLAIN, "splash") or refusal("pallas", r):
        return None
    _record("pallas", r)
    return _blocks(r.hardware.platform == "cpu")


@functools.cache
def _blocks(interpret: bool) -> Blocks:
    def forward(q, k, v, key_mask):
        return flash_attention(q, k, v, key_mask, interpret=interpret)

    def backward(q, k, v, key_mask, out, lse, dout):
        return flash_gradients(q, k, v, key_mask, dout, lse, rowsum(dout, out),
                               interpret=interpret)

    return Blocks(forward, backward)
