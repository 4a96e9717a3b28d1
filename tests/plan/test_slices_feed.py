"""What the hosts of TPU slices read of a batch, with the order that jax gives the real devices of a
slice (make test-plan); nothing is compiled."""

import collections
import importlib.util

import pytest

from apt_jax.parallel.mesh import check_batch, make_mesh
from apt_jax.plan.chips import parse_topology
from apt_jax.plan.devices import describe
from apt_jax.train.feeding import rows_of

pytestmark = [pytest.mark.plan, pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu")]


@pytest.mark.parametrize(("topology", "context", "batch"), [
    ("v5p:4x4x4", 1, 9062), ("v5p:4x8x8", 1, 9062), ("v6e:16x16", 1, 9062),
    ("v5p:4x4x4", 4, 2048), ("v5p:4x4x8", 4, 2048), ("v6e:8x16", 4, 2048),
])
def test_a_host_of_a_slice_reads_only_its_share(topology, context, batch):
    devices = describe(parse_topology(topology))
    mesh = make_mesh({"fsdp": -1, "context": context}, devices)
    size = check_batch(mesh, batch, 0)
    read = collections.Counter()
    hosts = {d.process_index for d in devices}
    for host in hosts:
        rows = rows_of(mesh, size, 0, host)
        assert len(rows) == size // len(hosts)
        read.update(rows.tolist())
    assert set(read) == set(range(size)) and set(read.values()) == {1}
