"""Collectives are read off the program's text: kind, bytes, axes, repetitions, overlap."""

import pytest

from apt_jax.plan.collectives import collectives
from apt_jax.plan.hlo import parse_hlo

GPU = '''HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %ag-start = (bf16[256,64]{1,0}, bf16[1024,64]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}, metadata={op_name="a(b)"}
  %gemm = (bf16[4,8]{1,0}, s8[16]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
  %ag-done = bf16[1024,64]{1,0} all-gather-done(%ag-start)
  %rs-start = ((bf16[1024,64]{1,0}), bf16[256,64]{1,0}) reduce-scatter-start(%g), replica_groups=[2,4]<=[8], to_apply=%add
  %copy = bf16[4,8]{1,0} copy(%y)
  %rs-done = bf16[256,64]{1,0} reduce-scatter-done(%rs-start)
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %copy)
}

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %w = (s32[], bf16[4,8]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"9"}}
  %ar = f32[100]{0} all-reduce(%g2), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %cp = bf16[64,2]{1,0} collective-permute(%z), source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  ROOT %r = f32[2]{0} copy(%a)
}
'''


def test_kind_bytes_axes_times_and_overlap():
    found = {c.name: c for c in collectives(parse_hlo(GPU), {"replica": 2, "fsdp": 4})}
    gather, scatter = found["ag-start"], found["rs-start"]
    assert (gather.kind, gather.axes, gather.group, gather.dtype) == ("all-gather", "fsdp", 4, "bf16")
    assert gather.bytes == 1024 * 64 * 2 and gather.wire == gather.bytes * 3 / 4
    assert gather.times == 9 and gather.in_loop and gather.overlapped
    assert scatter.kind == "reduce-scatter" and scatter.axes == "fsdp"
    assert scatter.bytes == 4 * 256 * 64 * 2 and not scatter.overlapped  # a copy hides nothing
    total, permute = found["ar"], found["cp"]
    assert (total.axes, total.wire, total.times) == ("replica", 2 * 400 * 1 / 2, 1)
    assert (permute.axes, permute.wire, permute.group) == ("fsdp", 256, 4)
    assert not total.in_loop


def test_without_a_note_the_bound_of_the_condition_counts():
    text = GPU.replace(', backend_config={"known_trip_count":{"n":"9"}}', "")
    found = {c.name: c for c in collectives(parse_hlo(text), {"replica": 2, "fsdp": 4})}
    assert found["ag-start"].times == 5


def test_how_tpus_spell_a_reduce_scatter():
    text = '''HloModule m

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %input = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %ar = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ds = bf16[16,8]{1,0:T(8,128)(2,1)} dynamic-slice(%ar, %i, %j), dynamic_slice_sizes={16,8}
}

ENTRY %main (a: bf16[64,8]) -> bf16[16,8] {
  ROOT %f = bf16[16,8]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
'''
    (found,) = collectives(parse_hlo(text), {"replica": 2, "fsdp": 4})
    assert (found.kind, found.axes, found.bytes, found.wire) == (
        "reduce-scatter", "fsdp", 1024, 768)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_hlo("not a module")
