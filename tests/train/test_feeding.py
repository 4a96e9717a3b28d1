"""Which rows of a global batch a process reads, and that they reach its devices."""

import collections

import jax
import numpy as np
import pytest
from tiny import tiny_batch

from apt_jax.parallel.mesh import make_mesh, update_sharding
from apt_jax.train.feeding import put_batch, rows_of, within
from apt_jax.train.steps import microbatches

SIZE = 24


def owners(names):
    """Whose a device is, by its number."""
    return lambda device: names[device.id]


@pytest.mark.parametrize(("sizes", "names", "accumulate", "shares"), [
    # mesh, the process of each of its devices, train.accumulate, rows of process 0 in eighths
    ({"fsdp": 4}, [0, 1, 2, 3], 1, "01"),
    ({"replica": 2, "fsdp": 2}, [0, 0, 1, 1], 1, "0123"),
    ({"fsdp": 2, "context": 2}, [0, 1, 2, 3], 1, "0123"),  # both devices work on the same samples
    ({"fsdp": 2, "context": 2}, [0, 1, 2, 3], 4, "01"),  # and wait on half of them each
    ({"context": 4}, [0, 0, 1, 1], 1, "01234567"),
    ({"fsdp": 8}, [0, 1, 0, 1, 0, 1, 0, 1], 1, "0246"),  # not one stretch
    ({"fsdp": 8}, [1, 0, 0, 1, 1, 1, 1, 1], 1, "12"),  # not equal
    ({"fsdp": 2, "context": 4}, [0, 0, 1, 1, 1, 1, 0, 0], 12, "0167"),  # a corner of a torus
])
def test_a_process_reads_what_waits_on_its_devices_and_no_more(sizes, names, accumulate, shares):
    mesh = make_mesh(sizes, jax.devices()[:len(names)])
    rows = rows_of(mesh, SIZE, accumulate, 0, owners(names))
    want = np.flatnonzero(np.isin(np.arange(SIZE) // 3, [int(c) for c in shares]))
    np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "context": 4}, {"fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("accumulate", [1, 3, 12])
def test_every_device_finds_its_rows_among_those_of_its_process(sizes, accumulate):
    mesh = make_mesh(sizes)
    process_of = owners([2, 0, 1, 1, 0, 2, 2, 0])
    whole = np.arange(SIZE)
    sharding = update_sharding(mesh, microbatches(accumulate, SIZE, mesh))
    held = collections.Counter()
    for device, (part,) in sharding.devices_indices_map((SIZE,)).items():
        rows = rows_of(mesh, SIZE, accumulate, process_of(device), process_of)
        found = whole[rows][within(rows, part)]
        np.testing.assert_array_equal(found, whole[part])
        held.update(found.tolist())
    assert set(held) == set(whole) and len(set(held.values())) == 1


def test_one_process_puts_the_whole_batch():
    mesh = make_mesh({"fsdp": 4, "context": 2})
    batch = tiny_batch(8)
    for name, value in put_batch(batch, mesh, 2).items():
        np.testing.assert_array_equal(np.asarray(value), batch[name])
        assert value.sharding.num_devices == 8


def test_a_batch_of_other_rows_is_refused():
    batch = {**tiny_batch(4), "size": np.int32(8)}
    with pytest.raises(ValueError, match="4 samples where this process has 8 of 8"):
        put_batch(batch, make_mesh({"fsdp": 4}, jax.devices()[:4]))
