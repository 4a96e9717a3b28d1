"""Compiler options: those that the installed compiler has, and those that our programs want on a CPU.

Unlike XLA_FLAGS they go with a single program and an unknown one is an error that can be caught.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

_LACKED = re.compile(r"No such compile option: '(\w+)'")
# XLA leaves matrix products and what surrounds them to YNNPACK. Without AVX-512 a second core hardly
# helped it: an image update of the demo at length took 1.02 s on two cores for 1.14 s on one, and
# 0.69 s without it (docs/benches.md).
_PLAIN_X86 = {"xla_cpu_experimental_ynn_fusion_type": ""}


def known_options(options: Mapping[str, Any], device: Any,
                  tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Those options that the compiler for `device` has; `tell` takes a line for each of the others.

    They come and go with XLA's versions. XLA_FLAGS still takes some that are gone, and they do
    nothing there, so leaving them out plans what runs.
    """
    left = dict(options)
    smallest = jax.jit(lambda x: x + 1).lower(
        jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device)))
    while left:
        try:
            smallest.compile(compiler_options=left)
            break
        except jax.errors.JaxRuntimeError as error:
            lacked = _LACKED.search(str(error))
            if lacked is None or lacked[1] not in left:
                break  # the program itself will say what is wrong
            del left[lacked[1]]
            tell(f"left out {lacked[1]}: the installed compiler has no such option")
    return left


@functools.cache
def cpu_options(platform: str) -> dict[str, Any]:
    """`compiler_options` of jax.jit for a network's program on devices of `platform`.

    Empty for everything but a CPU of Linux that says it has AVX2 and not AVX-512, and where the
    installed XLA lacks the option or the user's XLA_FLAGS have it.
    """
    if platform != "cpu" or not plain_x86():
        return {}
    given = os.environ.get("XLA_FLAGS", "")
    wanted = {name: value for name, value in _PLAIN_X86.items() if f"--{name}=" not in given}
    return known_options(wanted, jax.local_devices(backend="cpu")[0])


def plain_x86(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU names AVX2 among its flags and no AVX-512; False where nothing is named."""
    try:
        named = set(re.findall(r"\w+", cpuinfo.read_text()))
    except OSError:
        return False
    return "avx2" in named and "avx512f" not in named
