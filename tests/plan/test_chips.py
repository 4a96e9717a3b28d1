import pytest

from apt_jax.errors import UserError
from apt_jax.plan.chips import CHIPS, GIB, parse_topology
from apt_jax.plan.timeline import link_rate


def test_sizes_multiply_to_devices():
    assert parse_topology("h100:128x8").devices == 1024
    assert parse_topology("h100:128x8").hosts == 128 and parse_topology("v5p:4x4x8").hosts == 1
    assert parse_topology("V5P:4x4x8").devices == 128
    assert parse_topology("v6e:16x16").text == "v6e:16x16"
    assert 79 < parse_topology("h100:1x1").chip.memory / GIB < 79.2


@pytest.mark.parametrize("name", CHIPS)
def test_the_topology_that_an_error_proposes_is_one(name):
    for wrong in (name, f"{name}:8", f"{name}:2x2x2x2"):
        with pytest.raises(UserError) as error:
            parse_topology(wrong)
        proposed = str(error.value).rpartition("such as ")[2]
        assert parse_topology(proposed).chip.name == name


@pytest.mark.parametrize(("text", "says"), [
    ("h10:1x8", "'h100'"), ("h100", "h100:1x8"), ("h100:8", "HOSTSxGPUS"),
    ("h100:1x16", "write h100:2x8"), ("v5p:4x4", "3 axes"), ("v6e:4x4x4", "2 axes"),
    ("h100:0x8", "sizes"), ("h100:1x8x", "sizes"),
])
def test_a_wrong_topology_is_one_line_with_a_cure(text, says):
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_between_hosts_every_member_brings_its_port():
    chip = parse_topology("h100:4x8").chip

    assert link_rate(range(8), chip) == chip.fast
    assert link_rate(range(16), chip) == 8 * chip.slow  # eight ports a host, less than the fast net
    assert link_rate((0, 8, 16, 24), chip) == chip.slow
    few, alone = parse_topology("h100:2x4").chip, parse_topology("h100:8x1").chip
    assert link_rate(range(4), few) == few.fast
    assert link_rate(range(8), few) == 4 * few.slow and link_rate((0, 4), few) == few.slow
    assert link_rate(range(8), alone) == link_rate((0, 1), alone) == alone.slow
    tpu = parse_topology("v5p:4x4x4").chip
    assert link_rate(range(64), tpu) == tpu.fast
