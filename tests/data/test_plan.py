"""The order of samples: nothing lost, nothing doubled, the same for every number of processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.data.plan import PADDING, Plan, dropped_captions, shuffle


@st.composite
def any_plan(draw):
    """One to four buckets, some empty; one batch size for all or one for each."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum))
    size = st.integers(1, 12)
    each = st.lists(size, min_size=len(counts), max_size=len(counts))
    members = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    return Plan.build(members, draw(st.one_of(size, each)), draw(st.integers(0, 2**31 - 1)))


plans = any_plan()


def seen(plan, steps):
    numbers = np.concatenate([plan.batch(s).records for s in steps])
    return numbers[numbers != PADDING]


@given(plans, st.integers(0, 3))
def test_every_record_once_an_epoch(plan, epoch):
    total = sum(map(len, plan.members))
    first = epoch * plan.batches_per_epoch
    numbers = seen(plan, range(first, first + plan.batches_per_epoch))
    assert sorted(numbers) == list(range(total))


@given(plans)
def test_batches_are_whole_and_of_one_bucket(plan):
    for step in range(plan.batches_per_epoch):
        batch = plan.batch(step)
        assert batch.records.shape == (plan.sizes[batch.bucket],)
        real = batch.records[batch.records != PADDING]
        assert len(real) and set(real) <= set(plan.members[batch.bucket])
        assert (batch.records[len(real):] == PADDING).all()  # padding only at the end


@given(plans, st.integers(0, 10_000))
def test_a_step_needs_no_history(plan, step):
    again = Plan.build(plan.members, plan.batch_size, plan.seed)
    assert plan.batch(step).bucket == again.batch(step).bucket
    np.testing.assert_array_equal(plan.batch(step).records, again.batch(step).records)


@given(plans)
def test_only_one_short_batch_a_bucket(plan):
    short = {}
    for step in range(plan.batches_per_epoch):
        batch = plan.batch(step)
        if (batch.records == PADDING).any():
            short[batch.bucket] = short.get(batch.bucket, 0) + 1
    want = {b: 1 for b, m in enumerate(plan.members) if len(m) % plan.sizes[b]}
    assert short == want


def test_epochs_and_seeds_differ():
    plan = Plan.build([range(50)], 50, 0)
    other = Plan.build([range(50)], 50, 1)
    assert (plan.batch(0).records != plan.batch(1).records).any()
    assert (plan.batch(0).records != other.batch(0).records).any()
    assert (plan.batch(0).records != np.arange(50)).any()


def test_buckets_are_interleaved():
    plan = Plan.build([range(100), range(100, 200)], 5, 3)
    buckets = [plan.batch(s).bucket for s in range(plan.batches_per_epoch)]
    changes = sum(a != b for a, b in zip(buckets, buckets[1:]))
    assert changes > 8  # 20 + 20 batches in random order change about 20 times


def test_dropout_has_its_rate_and_changes_with_the_epoch():
    drops = np.stack([dropped_captions(4000, 0.1, 5, epoch) for epoch in range(5)])
    assert abs(drops.mean() - 0.1) < 0.01
    assert (drops[0] != drops[1]).any()
    np.testing.assert_array_equal(drops[3], dropped_captions(4000, 0.1, 5, 3))
    assert not dropped_captions(100, 0.0, 0, 0).any()
    assert dropped_captions(100, 1.0, 0, 0).all()


def test_shuffle_is_fixed_for_ever():
    """These numbers must never change: a run continued with a newer version relies on them."""
    assert shuffle(10, 0, 0, 1, 0).tolist() == FIXED


FIXED = [4, 7, 8, 6, 1, 2, 9, 0, 5, 3]


def test_a_plan_without_records_is_refused():
    with pytest.raises(ValueError, match="record"):
        Plan.build([[], []], 4, 0)
    with pytest.raises(ValueError, match="batch_size"):
        Plan.build([[1]], 0, 0)
    with pytest.raises(ValueError, match="batch_size"):
        Plan.build([[1]], [2, 2], 0)
