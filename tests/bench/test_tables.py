"""A table of scores is told from weights, activations and scratch space by its two dimensions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from apt_jax.bench.device_less import count_kernels
from apt_jax.bench.tables import is_table, pairs_of, tables
from apt_jax.config import load_config
from apt_jax.kernels.flash.attention import flash_attention
from apt_jax.kernels.oracle import oracle
from apt_jax.plan.hlo import parse_hlo

# An image of 4,352 tokens: the weights of two layers, an MLP's activations and cuBLASLt's scratch space
# are larger than a head's scores; a fusion's inside lies in registers.
HLO = """\
HloModule test, is_scheduled=true

%inside (p: bf16[4352,128]) -> f32[4352] {
  %p = bf16[4352,128] parameter(0)
  %scores = f32[4352,4352]{1,0} dot(%p, %p)
  ROOT %sum = f32[4352] reduce(%scores)
}

ENTRY %main (w: bf16[2,3072,12288], x: bf16[4352,3072]) -> bf16[4352,3072] {
  %w = bf16[2,3072,12288] parameter(0)
  %x = bf16[4352,3072] parameter(1)
  %y = (bf16[4352,12288]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %copy.1 = bf16[2,3072,12288] copy(%w)
  %fusion = f32[4352] fusion(%x), kind=kInput, calls=%inside
%s
  ROOT %out = bf16[4352,3072] copy(%x)
}
"""


def found(line, pair=(4352, 4352)):
    return tables(parse_hlo(HLO.replace("%s", line)), [pair])


def test_weights_activations_and_scratch_space_are_no_tables():
    assert found("") == []
    counted = count_kernels(HLO.replace("%s", ""), [], pairs=[(4352, 4352)])
    assert counted.tables == [] and counted.largest == 2 * 3072 * 12288


@pytest.mark.parametrize("shape", [
    "f32[1,24,4352,4352]", "f32[4352,24,4352]", "f32[104448,4352]",
    "(bf16[3,2], f32[24,4352,4352])"])
def test_scores_are_found_in_any_order_and_joined_with_heads(shape):
    (said,) = found(f"  %dot.7 = {shape} custom-call(%x), custom_call_target=\"__cublas$gemm\"")
    assert said.startswith("dot.7 ") and "4352" in said


def test_inputs_and_what_hands_them_on_are_not_made():
    for opcode in ("parameter(2)", "get-tuple-element(%y), index=0", "bitcast(%y)"):
        assert found(f"  %a = f32[4352,4352] {opcode}") == []
    assert len(found("  %a = pred[4352,4352] constant({...})")) == 1


def test_tokens_filled_up_to_tiles_are_still_the_same():
    assert is_table((24, 47_104, 47_056), (47_056, 47_056))
    assert not is_table((24, 52_000, 47_056), (47_056, 47_056))


def test_few_tokens_are_looked_for_as_they_are():
    """The demo's 72 tokens: its 96 channels are no padded 72."""
    assert is_table((3, 72, 72), (72, 72)) and is_table((72, 8), (8, 72))
    assert not is_table((96, 96), (72, 72)) and not is_table((72, 288), (72, 72))
    assert not is_table((512, 4096), (4095, 512))  # text states beside a part of Wan's video
    assert not is_table((72,), (72, 72)) and not is_table((0, 4352), (4352, 4352))


def test_a_turn_of_a_ring_has_its_own_pair():
    """Ulysses 2 in a ring of 4: a turn has a sixteenth of the table, three quarters with its heads."""
    config = load_config("configs/seaweed_8b_video.py",
                         ["--config.mesh.context=8", "--config.mesh.ulysses=2"])
    pairs = pairs_of(config)
    assert (47_056, 47_056) in pairs and (11_764, 11_764) in pairs and (5882, 47_056) in pairs
    assert any(is_table((1, 12, 11_764, 11_776), pair) for pair in pairs)
    assert pairs_of(load_config("configs/seaweed_8b_image.py", ["--config.mesh.context=1"])) == (
        (4352, 4352),)
    wan = load_config("configs/wan_1_3b_apt_video.py", [
        "--config.data.height=60", "--config.data.width=104", "--config.mesh.context=1"])
    assert pairs_of(wan) == ((32_760, 512), (32_760, 32_760))


def test_plain_attention_has_a_table_and_ours_has_none():
    """The real compiler's text, on this machine: what an absent kernel leaves in a program."""
    x = jax.ShapeDtypeStruct((1, 150, 2, 16), jnp.float32)
    for f, some in ((oracle, True), (lambda *a: flash_attention(*a, interpret=True)[0], False)):
        for part in (f, jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1, 2))):
            text = jax.jit(part).lower(x, x, x).compile().as_text()
            assert bool(tables(parse_hlo(text), [(150, 150)])) == some
