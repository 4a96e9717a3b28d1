"""Collectives are read off the program's text: kind, bytes, axes, repetitions, overlap."""

import pytest

from apt_jax.plan.chips import CHIPS
from apt_jax.plan.collectives import collectives, unread
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


def test_kind_bytes_axes_and_times():
    found = {c.name: c for c in collectives(parse_hlo(GPU), {"replica": 2, "fsdp": 4})}
    gather, scatter = found["ag-start"], found["rs-start"]
    assert (gather.kind, gather.axes, gather.group, gather.dtype) == ("all-gather", "fsdp", 4, "bf16")
    assert gather.bytes == 1024 * 64 * 2 and gather.wire == gather.bytes * 3 / 4
    assert gather.times == 9 and gather.steady
    assert scatter.kind == "reduce-scatter" and scatter.axes == "fsdp"
    assert scatter.bytes == 4 * 256 * 64 * 2
    total, permute = found["ar"], found["cp"]
    assert (total.axes, total.wire, total.times) == ("replica", 2 * 400 * 1 / 2, 1)
    assert (permute.axes, permute.wire, permute.group) == ("fsdp", 256, 4)
    assert not total.steady
    again = {c.name: c for c in collectives(parse_hlo(GPU), {"replica": 2, "fsdp": 4},
                                            microbatches=9)}
    assert not again["ag-start"].steady  # nine microbatches: once in each


def test_without_a_note_the_bound_of_the_condition_counts():
    text = GPU.replace(', backend_config={"known_trip_count":{"n":"9"}}', "")
    found = {c.name: c for c in collectives(parse_hlo(text), {"replica": 2, "fsdp": 4})}
    assert found["ag-start"].times == 5


def test_a_bound_among_the_first_values_of_a_loop_counts_too():
    """What gradient() keeps from the compiler (train/steps.py) is still a constant in its text."""
    text = GPU.replace(', backend_config={"known_trip_count":{"n":"9"}}', "")
    text = text.replace("  %bound = s32[] constant(5)\n",
                        "  %bound = s32[] get-tuple-element(%p.1), index=1\n")
    text = text.replace("  %w =", """  %many = s32[] constant(7)
  %copied = s32[] copy(%many)
  %init = (s32[], bf16[4,8]{1,0}) tuple(%zero, %copied)
  %w =""")
    found = {c.name: c for c in collectives(parse_hlo(text), {"replica": 2, "fsdp": 4})}
    assert found["ag-start"].times == 7


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


def entry(*lines):
    """A module of these lines, after the arrays p, bf16[64,8], and q, bf16[4096,4096]."""
    head = ["HloModule m", "", "ENTRY %main (p: bf16[64,8]) -> bf16[64,8] {",
            "  %p = bf16[64,8]{1,0} parameter(0)", "  %q = bf16[4096,4096]{1,0} parameter(1)"]
    return parse_hlo("\n".join([*head, *(f"  {line}" for line in lines), "}"]))


PRODUCT = ("%d{n} = (bf16[{rows},4096]{{1,0}}, s8[16]{{0}}) custom-call(%x{n}, %q), "
           'custom_call_target="__cublas$lt$matmul", backend_config={{"gemm_backend_config":'
           '{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"]}}}}}}')


@pytest.mark.parametrize("rows", [4096, 64])
def test_a_transfer_is_hidden_by_the_time_of_the_work_beside_it(rows):
    """32 MiB to 8 devices: 65 us; a product of 4096 rows takes 196 us, one of 64 rows 3 us."""
    chip = CHIPS["h100"]
    program = entry(
        f"%x0 = bf16[{rows},4096]{{1,0}} parameter(2)",
        "%s = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0}) all-gather-start(%y), "
        "replica_groups=[1,8]<=[8], dimensions={0}",
        PRODUCT.format(n=0, rows=rows),
        "ROOT %e = bf16[4096,4096]{1,0} all-gather-done(%s)")
    (found,) = collectives(program, {"fsdp": 8}, chip)
    assert found.seconds == pytest.approx(2**25 * 7 / 8 / chip.fast)
    work = max(2 * rows * 4096**2 / (0.71 * chip.flops),
               (2 * rows * 4096 * 2 + 2**25) / chip.bandwidth)
    assert found.hidden == pytest.approx(min(1.0, work / found.seconds), abs=0.01)
    assert (found.hidden == 1.0) == (rows == 4096)


def test_two_transfers_on_one_link_share_the_work_beside_them():
    lines = ["%x0 = bf16[1024,4096]{1,0} parameter(2)"]
    lines += [f"%s{i} = (bf16[512,4096]{{1,0}}, bf16[4096,4096]{{1,0}}) all-gather-start(%y{i}), "
              "replica_groups=[1,8]<=[8], dimensions={0}" for i in (1, 2)]
    lines += [PRODUCT.format(n=0, rows=1024),
              "%e1 = bf16[4096,4096]{1,0} all-gather-done(%s1)",
              "ROOT %e2 = bf16[4096,4096]{1,0} all-gather-done(%s2)"]
    first, second = collectives(entry(*lines), {"fsdp": 8}, CHIPS["h100"])
    assert 0.7 < first.hidden < 0.8 and second.hidden < 0.01  # 49 us of work for 65 + 65


def test_words_of_the_source_are_no_work():
    """A small fusion that a function called triton_gemm made hides next to nothing."""
    program = entry(
        "%s = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0}) all-gather-start(%y), "
        "replica_groups=[1,8]<=[8], dimensions={0}",
        '%f = bf16[8]{0} fusion(%z), kind=kLoop, calls=%none, metadata={op_name="jit(triton_gemm)/'
        'replica_groups={{0}} calls=%main {" stack_frame_id=4}, backend_config={"x":[]}',
        "ROOT %e = bf16[4096,4096]{1,0} all-gather-done(%s)")
    (found,) = collectives(program, {"fsdp": 8}, CHIPS["h100"])
    assert found.hidden < 0.01
    fusion = next(i for i in program.computations["main"] if i.name == "f")
    assert "triton" not in fusion.rest and "triton" in fusion.metadata
    assert fusion.rest.endswith('backend_config={"x":[]}')


def test_wrapped_collectives_are_read_and_counted_once():
    text = '''HloModule m

%wrapped (p.1: bf16[512,4096]) -> bf16[64,4096] {
  %p.1 = bf16[512,4096]{1,0} parameter(0)
  ROOT %rs = bf16[64,4096]{1,0} reduce-scatter(%p.1), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (p: bf16[512,4096]) -> bf16[64,4096] {
  %p = bf16[512,4096]{1,0} parameter(0)
  %start = ((bf16[512,4096]{1,0}), bf16[64,4096]{1,0}, u32[]) async-start(%p), calls=%wrapped
  %update = ((bf16[512,4096]{1,0}), bf16[64,4096]{1,0}, u32[]) async-update(%start)
  ROOT %end = bf16[64,4096]{1,0} async-done(%update)
}
'''
    (found,) = collectives(parse_hlo(text), {"fsdp": 8}, CHIPS["h100"])
    assert (found.name, found.kind, found.times) == ("start", "reduce-scatter", 1)
    assert found.bytes == 512 * 4096 * 2 and found.hidden == 0.0


def test_parts_of_an_axis():
    """'a':(2)2 is the part of size 2 that begins after a part of size 2."""
    line = ("ROOT %g = bf16[8]{{0}} all-reduce(%p), "
            "replica_groups=mesh['a'=8,'b'=2] {{{axes}}}, to_apply=%add")

    def first(axes):
        (found,) = collectives(entry(line.format(axes=axes)), {"replica": 8, "fsdp": 2})
        return found.members, found.group

    assert first("'a':(1)2") == ((0, 8), 2)
    assert first("'a':(2)2") == ((0, 4), 2)
    assert first("'a':(4)2") == ((0, 2), 2)
    assert first("'a':(2)4,'b'") == (tuple(range(8)), 8)


def test_a_permute_of_several_arrays_sends_each_once():
    pairs = "source_target_pairs={{0,1},{1,0}}"
    once = entry("ROOT %c = (bf16[64,8]{1,0}, bf16[64,8]{1,0}) collective-permute(%p, %p), "
                 + pairs)
    begun = entry("%c = ((bf16[64,8]{1,0}, bf16[64,8]{1,0}), (bf16[64,8]{1,0}, bf16[64,8]{1,0}), "
                  "u32[], u32[]) collective-permute-start(%p, %p), " + pairs,
                  "ROOT %d = (bf16[64,8]{1,0}, bf16[64,8]{1,0}) collective-permute-done(%c)")
    open_end = entry("ROOT %c = (bf16[64,8]{1,0}, bf16[64,8]{1,0}, u32[], u32[]) "
                     "collective-permute-start(%p), " + pairs)
    for program, count in ((once, 2), (begun, 2), (open_end, 1)):
        (found,) = collectives(program, {"context": 2})
        assert found.bytes == found.wire == count * 64 * 8 * 2


def test_joined_arrays_have_the_type_of_most_bytes():
    program = entry("ROOT %g = (f32[64]{0}, bf16[4096,4096]{1,0}) all-gather(%p, %q), "
                    "replica_groups=[1,8]<=[8], dimensions={0}")
    (found,) = collectives(program, {"fsdp": 8})
    assert found.dtype == "bf16" and found.bytes == 2 * 4096**2 + 64 * 4
    assert found.float32 == 64 * 4
    scattered = entry("ROOT %s = (f32[64]{0}, bf16[64]{0}) reduce-scatter(%p, %q), "
                      "replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add")
    (found,) = collectives(scattered, {"fsdp": 8})
    assert found.float32 == 8 * 64 * 4 and found.bytes == 8 * 64 * 6


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_hlo("not a module")


SPARSE = """HloModule m, is_scheduled=true

%called (p.2: bf16[512,4096]) -> bf16[4096,4096] {
  %p.2 = bf16[512,4096]{1,0} parameter(0)
  %t = (bf16[512,4096]{1,0}) tuple(%p.2)
  %g = bf16[512,4096]{1,0} get-tuple-element(%t), index=0
  ROOT %ag = bf16[4096,4096]{1,0} all-gather(%g), replica_groups=mesh['a'=8] {'a'}, dimensions={0}
}, execution_thread="sparsecore"

%wrapped (p.1: bf16[512,4096]) -> bf16[4096,4096] {
  %p.1 = bf16[512,4096]{1,0} parameter(0)
  ROOT %c = bf16[4096,4096]{1,0} custom-call(%p.1), custom_call_target="x", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[512,4096], q: bf16[4096,4096]) -> bf16[4096,4096] {
  %p = bf16[512,4096]{1,0} parameter(0)
  %q = bf16[4096,4096]{1,0} parameter(1)
  %start = ((), (), (s32[8192]{0})) async-start(), calls=%wrapped
  EARLY
  %update = ((bf16[512,4096]{1,0}), bf16[4096,4096]{1,0}, (s32[8192]{0})) async-update(%start, %p)
  LATE
  ROOT %end = bf16[4096,4096]{1,0} async-done(%update)
}
"""


@pytest.mark.parametrize("place", ["EARLY", "LATE"])
def test_a_gather_on_sparse_cores_runs_from_where_it_is_given_its_operand(place):
    """Its start has no operand: only work after the update that hands it over hides anything."""
    product = ('%d = bf16[4096,4096]{1,0} dot(%q, %q), lhs_contracting_dims={1}, '
               "rhs_contracting_dims={0}")
    program = parse_hlo(SPARSE.replace(place, product).replace(
        "LATE" if place == "EARLY" else "EARLY", ""))
    (found,) = collectives(program, {"fsdp": 8}, CHIPS["v5p"])
    assert (found.name, found.kind, found.axes, found.times) == ("start", "all-gather", "fsdp", 1)
    assert found.bytes == 2**25
    assert found.hidden == pytest.approx(1.0 if place == "LATE" else 0.0)


@pytest.mark.parametrize("old, new", [
    ("  %g = bf16", "  %k = bf16[512,4096]{1,0} copy(%p.2)\n  %g = bf16"),  # more than the gather is wrapped
    ("((), (), (s32[8192]{0})) async-start(), calls=%wrapped",
     'bf16[4096,4096]{1,0} custom-call(%p), custom_call_target="x", called_computations={%called}')])
def test_what_is_wrapped_otherwise_counts_as_waiting(old, new):
    text = SPARSE.replace("EARLY", "").replace("LATE", "").replace(old, new)
    (found,) = collectives(parse_hlo(text), {"fsdp": 8}, CHIPS["v5p"])
    assert (found.kind, found.bytes, found.hidden) == ("all-gather", 2**25, 0.0)


def test_what_is_not_met_is_told():
    text = SPARSE.replace("EARLY", "").replace("LATE", "")
    assert unread(parse_hlo(text)) == []
    assert unread(parse_hlo(text.replace("called_computations={%called}", "other={%called}"))) == ["ag"]


def test_a_text_that_was_cut_off_is_refused():
    with pytest.raises(ValueError, match="ends inside"):
        parse_hlo(SPARSE[:SPARSE.index("  %update")])
