"""What decides the attention kernel of a network, besides shapes: its name, hardware, derivatives.

A `Choice` is entered while a network is traced (`nn.functional.Network` enters the name of the
config, an objective that differentiates twice says so), never read when a program runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from apt_jax.config.schema import ATTENTION
from apt_jax.kernels import scope

BACKENDS = ATTENTION  # "auto" and the kernels' names


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a kernel runs on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      name: the maker's name of the device.
      capability: compute capability of an NVIDIA GPU (9.0 is H100), 0 elsewhere.
    """

    platform: str
    name: str
    capability: float = 0.0

    @classmethod
    def of(cls, device: Any) -> Hardware:
        """Of a jax.Device, which may be one of a topology that is not there."""
        platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        try:
            capability = float(getattr(device, "compute_capability", 0.0))
        except (TypeError, ValueError):  # not NVIDIA's
            capability = 0.0
        return cls(platform, str(device.device_kind), capability)


@dataclasses.dataclass(frozen=True)
class Choice:
    """backend: one of `BACKENDS`; derivatives: how often attention is differentiated;

    hardware: what to compile for, None for where arrays live now; brief: the program runs a few times,
    so that what it takes to compile counts more than what it takes to run.
    """

    backend: str = "auto"
    derivatives: int = 1
    hardware: Hardware | None = None
    brief: bool = False


_CURRENT: contextvars.ContextVar[Choice] = contextvars.ContextVar("choice", default=Choice())  # noqa: B039 - frozen


def current() -> Choice:
    """The choice in force."""
    return _CURRENT.get()


@contextlib.contextmanager
def choosing(**changes: Any) -> Iterator[None]:
    """`with choosing(backend="pallas"):` around what is traced; fields not named stay as they are."""
    token = _CURRENT.set(dataclasses.replace(current(), **changes))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def hardware() -> Hardware:
    """What the program being traced is for: as chosen, else the devices of the network's mesh, else
    jax's default device."""
    chosen = current().hardware
    if chosen is not None:
        return chosen
    mesh = getattr(scope.current(), "mesh", None)
    if mesh is not None:
        return Hardware.of(mesh.devices.flat[0])
    default = jax.config.jax_default_device
    return Hardware.of(default if hasattr(default, "device_kind") else jax.devices()[0])
