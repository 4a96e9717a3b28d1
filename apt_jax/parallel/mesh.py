"""The device mesh: from the sizes in the config to `jax.sharding.Mesh`.

    replica   copies of the parameters; splits the batch
    fsdp      shards the parameters; splits the batch
    context   splits the tokens of a sample (parallel/context.py); shards the parameters too
    tensor    splits heads and hidden channels of the layers (parallel/sharding.py)

The order puts the axes that talk most on neighbouring devices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from apt_jax.errors import UserError

AXES = ("replica", "fsdp", "context", "tensor")
BATCH_AXES = ("replica", "fsdp")
COPY = 128  # devices of one copy of the parameters, at most, where the mesh is left to us
SHARD_AXES = ("fsdp", "context")  # what the parameters are cut over, together


def resolve_sizes(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """Sizes of all axes of `AXES`, the one `-1` replaced by what is left.

    Args:
      sizes: axis name -> size; an axis that is absent has size 1. replica and fsdp may both be -1:
        copies of as many devices as sizes["copy"] allows.
      device_count: number of devices the mesh must use, all of them.

    Raises:
      UserError: sizes that do not multiply to `device_count`, naming the nearest size that does.
    """
    given = {axis: int(sizes[axis]) if axis in sizes else 1 for axis in AXES}
    asked = _describe(given)
    for axis, size in given.items():
        if size == 0 or size < -1:
            raise UserError(
                f"mesh.{axis} = {size} is no size; set a positive number, or -1 for all the rest")
    free = [axis for axis, size in given.items() if size == -1]
    if free == ["replica", "fsdp"]:
        # As many devices to a copy as allowed: beyond that, shards get thinner than the weights'
        # rows and the gathers longer than what they save.
        room = int(sizes["copy"] if "copy" in sizes else COPY) // (given["context"] * given["tensor"])
        rest = device_count // (given["context"] * given["tensor"])
        given["fsdp"] = max(divisors(rest, room), default=1)
        free = ["replica"]
    if len(free) > 1:
        raise UserError(
            f"{' and '.join(f'mesh.{axis}' for axis in free)} are all -1; set -1 on one axis only, "
            "or on replica and fsdp")
    fixed = math.prod(size for size in given.values() if size != -1)
    if free and device_count % fixed == 0:
        given[free[0]] = device_count // fixed
        return given
    if not free and fixed == device_count:
        return given
    # Name one axis to change and the size nearest to the given one that makes the mesh fit.
    mendable = [a for a in AXES if given[a] != -1 and device_count % (fixed // given[a]) == 0]
    if not mendable:
        raise UserError(
            f"the mesh {asked} does not fit {device_count} devices; the nearest that works is "
            f"{_describe(_nearest_mesh(given, device_count))}")
    axis = max(mendable, key=lambda a: given[a])
    room = device_count // (fixed // given[axis])
    fits = divisors(room) if free else [room]
    nearest = min(fits, key=lambda d: (abs(d - given[axis]), d))
    raise UserError(
        f"the mesh {asked} does not fit {device_count} devices; "
        f"the nearest size that works is mesh.{axis} = {nearest}")


def _nearest_mesh(given: Mapping[str, int], device_count: int) -> dict[str, int]:
    """The mesh of all devices whose given sizes change by the smallest factors, -1 by any."""
    meshes = (sizes for sizes in itertools.product(divisors(device_count), repeat=len(AXES))
              if math.prod(sizes) == device_count)
    return dict(zip(AXES, min(meshes, key=lambda sizes: sum(
        abs(math.log(size / asked))
        for size, asked in zip(sizes, given.values(), strict=True) if asked != -1)), strict=True))


def _describe(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `AXES` over all devices (or over `devices`).

    The axes are Auto: the compiler places the collectives, the models carry no sharding code.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_sizes(sizes, len(devices))
    types = (AxisType.Auto,) * len(shape)
    return Mesh(_placed(shape, devices), tuple(shape), axis_types=types)


def _placed(shape: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the mesh's shape, those that talk most on the fastest links.

    Not `jax.make_mesh`: it refuses devices of more than one slice, which jax calls each GPU host.
    """
    slices = sorted({_slice(device) for device in devices})
    if devices[0].platform != "tpu":
        # Hosts in order, and a host's devices side by side: the last axes stay within a host.
        return np.array(sorted(devices, key=_slice), object).reshape(tuple(shape.values()))
    outer, rest = dict.fromkeys(shape, 1), len(slices)
    for axis in BATCH_AXES:  # what talks least crosses the network between slices
        outer[axis] = math.gcd(rest, shape[axis])
        rest //= outer[axis]
    if rest > 1:
        raise UserError(
            f"mesh.replica = {shape['replica']} and mesh.fsdp = {shape['fsdp']} cannot be split "
            f"over {len(slices)} TPU slices; the nearest size that works is mesh.replica = "
            f"{len(slices)}, with mesh.fsdp = -1")
    inner = [size // outer[axis] for axis, size in shape.items()]

    def lay(split: bool) -> np.ndarray:
        if len(slices) == 1:  # whose devices need not say which one
            return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(inner, tuple(outer.values()), devices,
                                                    allow_split_physical_axes=split)

    try:
        return lay(split=False)
    except NotImplementedError:
        # No side of the TPU slice is a product of the sizes (16x16 as 2 x 32 x 4): cut the sides.
        return lay(split=True)


def _slice(device: jax.Device) -> int:
    """The TPU slice, or the GPU host, that a device belongs to; 0 where there is but one."""
    return getattr(device, "slice_index", None) or 0


def divisors(number: int, most: int | None = None) -> list[int]:
    """The divisors of a number, ascending, up to `most`; none of 0."""
    return [d for d in range(1, min(number, number if most is None else most) + 1)
            if number % d == 0]


def _nearest_divisor(wanted: int, of: int) -> int:
    """The divisor of `of` nearest to `wanted`, the smaller of two."""
    return min(divisors(of), key=lambda d: (abs(d - wanted), d))


def ulysses_size(context: int, heads: int, wanted: int = -1, fsdp: int = 1) -> int:
    """How many devices of the context axis exchange heads; the others pass keys around a ring.

    Args:
      context: size of the axis.
      heads: attention heads on one device of the tensor axis.
      wanted: config.mesh.ulysses; -1 is the most that context and heads allow.
      fsdp: size of that axis, which can take the devices of a ring.

    Raises:
      UserError: a size that divides not both, naming the nearest that does, in a ring and without.
    """
    most = math.gcd(context, heads)
    if wanted == -1:
        return most
    if wanted < 1 or most % wanted:
        nearest = _nearest_divisor(wanted, most)
        ring = context // nearest
        ways = "" if ring == 1 else (f" (Ulysses {nearest} x ring {ring}), or with it mesh.context = "
                                     f"{nearest} and mesh.fsdp = {fsdp * ring}")
        raise UserError(
            f"mesh.ulysses = {wanted} must divide mesh.context = {context} and the {heads} heads "
            f"of a device; the nearest size that works is mesh.ulysses = {nearest}{ways}")
    return wanted


def check_model(mesh: Mesh, model: Mapping[str, Any], discriminator_heads: int = 0,
                ulysses: int = -1) -> None:
    """Refuses a network that the tensor and context axes cannot cut.

    Args:
      model: config.model.
      discriminator_heads: attention heads of the discriminator's head blocks, 0 if there is none.
      ulysses: config.mesh.ulysses.

    Raises:
      UserError: naming the nearest size that works.
    """
    ways = mesh.shape["tensor"]
    hidden = round(model["width"] * model["mlp_ratio"])
    sizes = {"model.heads": model["heads"], "the MLP's width": hidden}
    if discriminator_heads:
        sizes["discriminator.heads"] = discriminator_heads
    for name, size in sizes.items():
        if size % ways:
            shared = mesh.shape["fsdp"] * ways
            nearest = _nearest_divisor(ways, math.gcd(shared, *sizes.values()))
            fsdp = shared // nearest
            raise UserError(f"mesh.tensor = {ways} does not divide {name} = {size}; the nearest "
                            f"size that works is mesh.tensor = {nearest}, with mesh.fsdp = {fsdp}")
    ulysses_size(mesh.shape["context"], model["heads"] // ways, ulysses, mesh.shape["fsdp"])


def waiting_axes(mesh: Mesh, microbatches: int) -> tuple[str, ...]:
    """Further axes over which the samples of one update can wait for their turn, memory shared.

    The devices of the context and tensor axes work on the same sample, but only on one of
    `microbatches` at a time: each keeps a part of the others until they are due.
    """
    axes, ways = (), 1
    for axis in ("context", "tensor"):
        if mesh.shape[axis] > 1 and microbatches % (ways * mesh.shape[axis]) == 0:
            axes, ways = (*axes, axis), ways * mesh.shape[axis]
    return axes


def update_sharding(mesh: Mesh, microbatches: int) -> NamedSharding:
    """Sharding of one array [B, ...] of the samples of an update, before it is cut up."""
    return NamedSharding(mesh, PartitionSpec((*BATCH_AXES, *waiting_axes(mesh, microbatches))))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """Over how many devices one batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_unit(mesh: Mesh, accumulate: int) -> int:
    """What divides a global batch that is filled up: its devices times train.accumulate, of which 0 (one
    sample at a time) asks for no more than 1."""
    return batch_ways(mesh) * (accumulate or 1)


def check_batch(
    mesh: Mesh, batch_size: int, accumulate: int = 1, name: str = "train.batch_size"
) -> int:
    """The global batch that the mesh and the accumulation can split evenly: batch_size, or a little
    more, to be filled up with samples that the loss does not count (9,062 fits no fleet).

    Raises UserError where more than a tenth of the batch would be empty.
    """
    if accumulate < 0:
        raise UserError(f"train.accumulate = {accumulate} must be at least 0; set it to 1")
    unit = batch_unit(mesh, accumulate)
    filled = -(-batch_size // unit) * unit
    if batch_size < 1 or (filled - batch_size) * 10 > filled:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise UserError(
            f"{name} = {batch_size} does not split over {batch_ways(mesh)} devices "
            f"times {accumulate or 1} microbatches; the nearest size that works is {nearest}")
    return filled
