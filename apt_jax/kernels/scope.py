"""How attention and token streams lie on a mesh while a network is traced.

Models call `kernels.attention` and `nn.stack` and know nothing of devices. A `Scope` says how the
two are done on a mesh; `nn.functional.Network` holds one and enters it for the length of its own
forward pass, so that the program of a network depends on the network alone (nothing else is read
when it is traced, and jit's caches, keyed by the network, stay true).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax


class Scope(Protocol):
    """What `parallel/context.py` implements."""

    @property
    def whole(self) -> bool:
        """Whether attention meets all tokens of a sample at once, in the order of the streams."""

    def attention(self, q: Sequence[jax.Array], k: Sequence[jax.Array], v: Sequence[jax.Array],
                  key_mask: jax.Array | None, *, hidden_last: bool = False) -> list[jax.Array]:
        """Attention over the tokens of all parts together; see `kernels.attention`."""

    def tokens(self, carry: Any) -> Any:
        """The streams [B, N, D] of a tree, each on the devices that keep its tokens."""

    def samples(self, tree: Any) -> Any:
        """Arrays [B, ...] that belong to samples and have no tokens, with their samples."""

    def layer(self, params: Any) -> Any:
        """One layer's parameters, cut over devices as they lie, gathered for its computation."""


_CURRENT: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("scope", default=None)


def current() -> Scope | None:
    """The scope of the network being traced, None on one device."""
    return _CURRENT.get()


@contextlib.contextmanager
def entered(scope: Scope | None) -> Iterator[None]:
    """`with entered(scope):` around one forward pass."""
    token = _CURRENT.set(scope)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def per_sample(tree: Any) -> Any:
    """The arrays [B, ...] of a tree where their samples are; as they are on one device."""
    scope = current()
    return tree if scope is None else scope.samples(tree)
