"""Layouts there and back, and tables that do not fit."""

import numpy as np
import pytest

from apt_jax.convert import table
from apt_jax.convert.table import Rule, linear, make_plan, padded, patch_conv, scale
from apt_jax.errors import UserError

KERNEL, BIAS = table.channel_last_patch((1, 2, 3))


@pytest.mark.parametrize(("layout", "ours", "theirs"), [
    (table.SAME, (3, 4), (3, 4)),
    (table.LINEAR, (3, 4), (4, 3)),
    (table.CONV2, (2, 3, 4, 5), (5, 4, 2, 3)),
    (table.CONV3, (2, 3, 4, 5, 6), (6, 5, 2, 3, 4)),
    (patch_conv((1, 2, 3)), (24, 5), (5, 4, 1, 2, 3)),
    (padded(before=1), (6, 5), (1, 6, 5)),
    (padded(after=2), (7,), (7, 1, 1)),
    (KERNEL, (5, 24), (24, 5)),
    (BIAS, (24,), (24,)),
])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layouts_there_and_back(layout, ours, theirs, dtype):
    import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)

    x = np.arange(np.prod(ours), dtype=np.float32).astype(dtype).reshape(ours)
    there = layout.to_theirs(x)
    assert there.shape == theirs == layout.their_shape(ours) and there.dtype == x.dtype
    assert there.flags.c_contiguous
    np.testing.assert_array_equal(layout.to_ours(there, ours), x)


def test_layouts_by_hand():
    """A value by its indices: [out, in] of a Linear, [O, I, kt, kh, kw], [patch, C]."""
    x = np.arange(2 * 3 * 4 * 5 * 6).reshape(6, 5, 2, 3, 4).astype(np.float32)
    assert table.CONV3.to_ours(x, (2, 3, 4, 5, 6))[1, 2, 3, 4, 5] == x[5, 4, 1, 2, 3]
    x = np.arange(5 * 4 * 6).reshape(5, 4, 1, 2, 3).astype(np.float32)
    # our token is channel-major: channel 2, row 1, column 2
    assert patch_conv((1, 2, 3)).to_ours(x, (24, 5))[2 * 6 + 1 * 3 + 2, 3] == x[3, 2, 0, 1, 2]
    x = np.arange(24 * 5).reshape(24, 5).astype(np.float32)
    # their output token is [row, column, channel]: row 1, column 2, channel 3 of 4
    assert KERNEL.to_ours(x, (5, 24))[1, 3 * 6 + 1 * 3 + 2] == x[(1 * 3 + 2) * 4 + 3, 1]
    assert BIAS.to_ours(x[:, 0].copy(), (24,))[3 * 6 + 1 * 3 + 2] == x[(1 * 3 + 2) * 4 + 3, 0]


RULES = [*linear("blocks/qkv", "layer.{layer}.q", "layer.{layer}.k", "layer.{layer}.v"),
         *scale("{side}/norm", "{side}.norm"), Rule("table", ("emb",))]
SHAPES = {"blocks/qkv/kernel": (2, 5, 12), "blocks/qkv/bias": (2, 12), "left/norm/scale": (3,),
          "right/norm/scale": (4,), "table": (7, 2)}


def test_a_plan_stacks_joins_and_names():
    plan = make_plan(RULES, SHAPES)
    assert plan.theirs["layer.1.k.weight"] == (4, 5) and plan.theirs["right.norm.weight"] == (4,)
    assert len(plan.theirs) == 2 * 3 * 2 + 3
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(4, 5)).astype(np.float32) for _ in range(3)]
    layer = plan.leaves["blocks/qkv/kernel"].join(parts)
    np.testing.assert_array_equal(layer, np.concatenate([p.T for p in parts], axis=1))
    for a, b in zip(plan.leaves["blocks/qkv/kernel"].split(layer), parts, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("rules", "shapes", "says"), [
    (RULES, {**SHAPES, "new": (1,)}, "new matches 0 rules"),
    ([*RULES, Rule("table", ("other",))], SHAPES, "table matches 2 rules"),
    ([*RULES, Rule("gone", ("gone",))], SHAPES, r"match nothing: \['gone'\]"),
    ([*RULES, Rule("again", ("emb",))], {**SHAPES, "again": (7, 2)}, "takes emb twice"),
    (RULES, {**SHAPES, "blocks/qkv/bias": (2, 11)}, "3 equal parts"),
])
def test_a_table_that_does_not_fit_the_network(rules, shapes, says):
    with pytest.raises(ValueError, match=says):
        make_plan(rules, shapes)


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop("layer.1.q.bias"), r"lacks tensor layer\.1\.q\.bias;"),
    (lambda t: [t.pop("layer.1.q.bias"), t.pop("emb")], "lacks tensor emb and 1 more"),
    (lambda t: t.update({"layer.2.q.bias": (4,)}), r"unknown tensor layer\.2\.q\.bias"),
    (lambda t: t.update({"layer.0.q.weight": (5, 4)}),
     r"layer\.0\.q\.weight is \(5, 4\), its config.json makes it \(4, 5\)"),
])
def test_wrong_tensors_are_named(change, says):
    plan = make_plan(RULES, SHAPES)
    found = dict(plan.theirs)
    plan.check(found, "here")
    change(found)
    with pytest.raises(UserError, match=says) as error:
        plan.check(found, "here")
    assert "\n" not in str(error.value)


def test_tied_tensors_by_either_name():
    plan = make_plan(RULES, SHAPES, {"copy": "emb"})
    both = {**plan.theirs, "copy": (7, 2)}
    plan.check(both, "here")
    assert plan.choosing(both) is plan
    other = {**plan.theirs, "copy": (7, 2)}
    del other["emb"]
    plan.choosing(other).check(other, "here")
    with pytest.raises(UserError, match="lacks tensor emb"):
        plan.check(other, "here")
    with pytest.raises(UserError, match=r"copy is \(2, 7\)"):
        plan.check({**plan.theirs, "copy": (2, 7)}, "here")
