"""Mesh sizes: every axis, the rest, and errors that name what would work."""

import math
import re
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.config import base_config, load_config
from apt_jax.errors import UserError
from apt_jax.parallel.mesh import (
    AXES,
    check_batch,
    check_model,
    make_mesh,
    resolve_sizes,
    ulysses_size,
    update_sharding,
    waiting_axes,
)


@given(devices=st.integers(1, 64), replica=st.integers(1, 64))
def test_the_rest_fills_the_machine_or_the_error_names_a_size_that_does(devices, replica):
    sizes = {"replica": replica, "fsdp": -1}
    try:
        found = resolve_sizes(sizes, devices)
    except UserError as error:
        nearest = int(str(error).rsplit("= ", 1)[1])
        found = resolve_sizes({**sizes, "replica": nearest}, devices)
        assert all(abs(d - replica) >= abs(nearest - replica)
                   for d in range(1, devices + 1) if devices % d == 0)
    assert math.prod(found.values()) == devices
    assert tuple(found) == AXES


@pytest.mark.parametrize(("sizes", "says"), [
    ({"replica": 2, "fsdp": 2}, "mesh.replica = 4"),
    ({"replica": 3, "fsdp": -1}, "mesh.replica = 2"),
    ({"context": -1, "fsdp": -1}, "mesh.fsdp and mesh.context are all -1"),
    ({"replica": -1, "context": -1, "fsdp": -1}, "mesh.replica and mesh.fsdp and mesh.context.* on "
                                                 "replica and fsdp"),
    ({"replica": 3, "fsdp": 3}, "works is replica=2 x fsdp=4 x context=1 x tensor=1"),
    ({"replica": 3, "fsdp": -1, "context": 3}, "works is replica=2 x fsdp=1 x context=4"),
    ({"replica": -1, "fsdp": -1, "context": 3}, "fsdp=-1 x context=3"),
    ({"replica": 0, "fsdp": -1}, "mesh.replica = 0"),
    ({"replica": 3, "fsdp": 7}, "mesh.replica = 1"),
])
def test_wrong_sizes_end_in_one_line(sizes, says):
    devices = 7 if sizes["fsdp"] == 7 else 8
    with pytest.raises(UserError, match=says) as error:
        make_mesh(sizes, (jax.devices() * 2)[:devices])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("tensor", "heads", "head_blocks", "says"), [
    (8, 12, 0, "mesh.tensor = 8 does not divide model.heads = 12.*mesh.tensor = 4"),
    (4, 12, 6, "discriminator.heads = 6.*mesh.tensor = 2"),
])
def test_tensor_must_divide_heads_and_widths(tensor, heads, head_blocks, says):
    model = {"heads": heads, "width": 12 * heads, "mlp_ratio": 4.0}
    with pytest.raises(UserError, match=says) as error:
        check_model(make_mesh({"tensor": tensor}, jax.devices()[:tensor]), model, head_blocks)
    # What it names does fit the devices: no second error sends the user back.
    named = dict(re.findall(r"mesh\.(\w+) = (\d+)", str(error.value).split("works is")[1]))
    check_model(make_mesh({axis: int(size) for axis, size in named.items()},
                          jax.devices()[:tensor]), model, head_blocks)


def test_the_tensor_size_named_fits_the_devices_left_to_it():
    """Six devices, of which three share a clip: 2 must not be named, whose mesh has four."""
    mesh = make_mesh({"context": 2, "tensor": 3, "fsdp": 1}, (jax.devices() * 2)[:6])
    with pytest.raises(UserError, match="mesh.tensor = 1, with mesh.fsdp = 3"):
        check_model(mesh, {"heads": 40, "width": 40, "mlp_ratio": 4.0})


@dataclass(frozen=True)
class _Device:
    """A stand-in for a device of several hosts as jax shows it: each GPU host is a "slice"."""
    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str = "NVIDIA H100 80GB HBM3"


def _hosts(hosts, each, platform="gpu"):
    return [_Device(each * host + i, host, host, platform)
            for host in range(hosts) for i in range(each)]


def test_gpu_hosts_are_laid_out_with_the_busy_axes_inside_a_host():
    devices = _hosts(4, 8)
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(32)]
    for order in (devices, shuffled):
        mesh = make_mesh({"replica": 2, "fsdp": -1, "context": 4}, order)
        hosts = np.vectorize(lambda d: d.slice_index)(mesh.devices)
        assert mesh.devices.shape == (2, 4, 4, 1)
        assert (hosts == hosts[:, :, :1]).all()  # a clip stays on one host
        assert sorted(hosts[0].ravel()) == [0] * 8 + [1] * 8  # and a copy on two
        assert len({d.id for d in mesh.devices.flat}) == 32


@pytest.mark.parametrize("slices", [3, 16])
def test_tpu_slices_must_split_replica_or_fsdp(slices):
    sizes = {"replica": 2, "fsdp": 4, "context": slices}
    with pytest.raises(UserError, match=f"mesh.replica = {slices}, with mesh.fsdp = -1"):
        make_mesh(sizes, _hosts(slices, 8, "tpu"))


def test_ulysses_takes_what_the_heads_allow_and_the_ring_the_rest():
    assert ulysses_size(8, 24) == 8
    assert ulysses_size(8, 12) == 4  # Wan 1.3B on eight devices: Ulysses 4 inside ring 2
    assert ulysses_size(8, 5) == 1
    assert ulysses_size(8, 24, 2) == 2


def test_the_heads_of_wan_on_eight_devices_are_told_both_ways():
    """Ulysses 4 x ring 2, or context 4 x fsdp 2; each of them is taken."""
    wan = {"heads": 12, "width": 1536, "mlp_ratio": 8960 / 1536}
    with pytest.raises(UserError) as error:
        check_model(make_mesh({"context": 8}), wan, ulysses=8)
    assert str(error.value).endswith("mesh.ulysses = 4 (Ulysses 4 x ring 2), or with it mesh.context "
                                     "= 4 and mesh.fsdp = 2")
    check_model(make_mesh({"context": 8}), wan, ulysses=4)
    check_model(make_mesh({"context": 4, "fsdp": 2}), wan, ulysses=4)
    with pytest.raises(UserError, match="mesh.fsdp = 4$"):  # of two devices, that the ring's join
        check_model(make_mesh({"context": 4, "fsdp": 2}), {**wan, "heads": 6}, ulysses=4)
    with pytest.raises(UserError, match="mesh.ulysses = 8$"):
        ulysses_size(8, 24, 16)


def test_the_width_of_the_mlp_is_the_networks():
    """Rounded, not cut: 1344 * (3264 / 1344) is a bit less than 3264 in binary, 24 * 1.4 is 33.6."""
    from apt_jax.convert.tables import wan
    from apt_jax.models.presets import make_generator
    from apt_jax.weights import flatten

    for width, ratio, hidden in ((24, 1.4, 34), (1344, 3264 / 1344, 3264)):
        model = {**base_config().model.to_dict(), "family": "wan", "width": width, "heads": 2,
                 "head_dim": width // 2, "depth": 1, "mlp_ratio": ratio, "text_tokens": 512}
        shape = flatten(make_generator(model).abstract())["backbone/blocks/mlp/up/kernel"].shape
        assert shape[-1] == hidden == wan.config_from(model)["ffn_dim"]
        check_model(make_mesh({"tensor": 2, "fsdp": 4}), model)


def test_batch_must_split_over_devices_and_microbatches():
    mesh = make_mesh({"replica": 2, "fsdp": -1})
    assert check_batch(mesh, 32, accumulate=4) == 32
    assert check_batch(mesh, 9062, accumulate=2) == 9072  # the paper's, ten of them empty
    assert check_batch(mesh, 9062, accumulate=0) == 9064
    config = load_config("configs/seaweed_8b_image.py", [])
    assert check_batch(mesh, config.train.batch_size, config.train.accumulate) == 9064
    with pytest.raises(UserError, match="nearest size that works is 32"):
        check_batch(mesh, 40, accumulate=4)
    with pytest.raises(UserError, match="nearest size that works is 8"):
        check_batch(mesh, 3)


@pytest.mark.parametrize(("microbatches", "axes", "rows"), [
    (16, ("context", "tensor"), 2), (8, ("context", "tensor"), 2), (4, ("context",), 4),
    (2, ("tensor",), 8), (3, (), 16), (1, (), 16),
])
def test_microbatches_wait_on_the_devices_that_share_a_sample(microbatches, axes, rows):
    mesh = make_mesh({"context": 4, "tensor": 2})
    assert waiting_axes(mesh, microbatches) == axes
    assert update_sharding(mesh, microbatches).shard_shape((16, 3)) == (rows, 3)
