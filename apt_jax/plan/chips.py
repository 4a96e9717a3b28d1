"""What is known of each accelerator: memory, peak rates and links, all published figures.

Rates are the makers' dense bfloat16 peaks. A link's rate is one way, per device and per mesh
direction; `fast` joins the devices of one host (NVLink) or of one slice (ICI), `slow` joins hosts.
"""

from __future__ import annotations

import dataclasses
import math
import re

from apt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      kind: "cuda" or "tpu": which compiler.
      memory: bytes that a program may use.
      flops: bfloat16 FLOP/s of the matrix units.
      bandwidth: bytes/s of device memory.
      fast: bytes/s of a device to its neighbours on the fast network, one way.
      slow: bytes/s of a device to other hosts, one way.
      host_devices: devices of one host on the fast network (0: the whole slice is one); of CHIPS
        the most that it joins, of a `Topology` those that its hosts have.
      attention: the backend of `model.attention` that serves it by default.
    """

    name: str
    kind: str
    memory: int
    flops: float
    bandwidth: float
    fast: float
    slow: float
    host_devices: int
    attention: str


GIB = 2**30

CHIPS: dict[str, Chip] = {
    chip.name: chip for chip in (
        # SXM5; NVLink 4: 900 GB/s both ways; one 400 Gb/s InfiniBand port a GPU. The memory is
        # what the driver reports of 80 GB.
        Chip("h100", "cuda", 84_942_979_072, 989e12, 3.35e12, 450e9, 50e9, 8, "pallas"),
        Chip("h200", "cuda", 150_000_000_000, 989e12, 4.8e12, 450e9, 50e9, 8, "pallas"),
        # ICI: one way per link; a ring of one torus axis uses two links (both ways round).
        Chip("v4", "tpu", 32 * GIB, 275e12, 1.2e12, 90e9, 6.25e9, 0, "splash"),
        Chip("v5e", "tpu", 16 * GIB, 197e12, 0.82e12, 90e9, 6.25e9, 0, "splash"),
        Chip("v5p", "tpu", 95 * GIB, 459e12, 2.77e12, 180e9, 6.25e9, 0, "splash"),
        Chip("v6e", "tpu", 32 * GIB, 918e12, 1.64e12, 180e9, 12.5e9, 0, "splash"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some devices of one chip: `sizes` are hosts x devices (GPUs) or the torus of a TPU slice."""

    chip: Chip
    sizes: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def hosts(self) -> int:
        """Hosts of GPUs; a TPU slice, whose devices are on one network, counts as one."""
        return self.sizes[0] if self.chip.host_devices else 1

    @property
    def text(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"


def parse_topology(text: str) -> Topology:
    """"h100:2x8" (hosts x GPUs), "v5p:4x4x8" or "v6e:16x16" (the torus of the slice).

    Raises UserError, naming what would work.
    """
    name, _, sizes = text.strip().lower().partition(":")
    if name not in CHIPS:
        from apt_jax.config.load import nearest

        raise UserError(f"unknown chip {name!r} in topology {text!r}{nearest(name, CHIPS)}; known: "
                        f"{', '.join(CHIPS)}")
    chip = CHIPS[name]
    axes = 3 if name in ("v4", "v5p") else 2
    example = f"{name}:{'1x8' if chip.kind == 'cuda' else 'x'.join(['4'] * axes)}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"topology {text!r} needs sizes after the colon, such as {example}")
    found = tuple(map(int, sizes.split("x")))
    if chip.kind == "cuda":
        if len(found) != 2:
            raise UserError(f"topology {text!r} must be {name}:HOSTSxGPUS, such as {example}")
        if found[1] > chip.host_devices:
            raise UserError(f"topology {text!r} has {found[1]} GPUs a host; the fast network joins "
                            f"{chip.host_devices}: write {name}:"
                            f"{math.ceil(math.prod(found) / chip.host_devices)}x{chip.host_devices}")
        chip = dataclasses.replace(chip, host_devices=found[1])  # the rest is behind the ports
    elif len(found) != axes:
        raise UserError(f"topology {text!r}: a {name} slice has {axes} axes, such as {example}")
    return Topology(chip, found)
