"""Stage 1's loss, with method.md's mistake 5: the teacher is asked along the whole grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import (
    CONSISTENCY,
    NETS,
    NULL_MASK,
    NULL_TEXT,
    Recorder,
    check_gradient,
    make_batch,
    make_keys,
    parameters,
    part_of,
    sum_of,
    velocity,
)

from apt_jax.diffusion.time_shift import time_grid
from apt_jax.objectives import Nets, consistency

STUDENT, TEACHER = parameters("velocity", 1), parameters("velocity", 2)
FROZEN = {"teacher": TEACHER, "null_text": NULL_TEXT, "null_mask": NULL_MASK}
SINGLE = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, FROZEN)


def column(t):
    return np.asarray(t, np.float64)[:, None, None, None, None]


def asked(recorder):
    """The velocity calls as (student's, teacher's), told apart by their first parameter leaf."""
    calls = recorder.of("velocity")
    first = np.asarray(jax.tree.leaves(TEACHER)[0])
    teacher = [c for c in calls if np.allclose(c.tag, first)]
    return [c for c in calls if not np.allclose(c.tag, first)], teacher


def by_hand(batch, x_t, t, t_less, guidance):
    """(loss [B], x_hat) in numpy."""
    text, mask = batch["text"], batch["text_mask"]
    null = np.stack([NULL_TEXT] * len(t)), np.stack([NULL_MASK] * len(t))
    with_text = velocity(TEACHER, x_t, t, text, mask, xp=np)
    without = velocity(TEACHER, x_t, t, *null, xp=np)
    x_hat = x_t + column(t_less - t) * (without + guidance * (with_text - without))
    student = x_t - column(t) * velocity(STUDENT, x_t, t, text, mask, xp=np)
    target = x_hat - column(t_less) * velocity(STUDENT, x_hat, t_less, text, mask, xp=np)
    return ((student - target) ** 2).reshape(len(t), -1).mean(1), x_hat


def test_value_by_hand(x64):
    batch, recorder = make_batch(6), Recorder()
    loss, aux = consistency.loss(STUDENT, FROZEN, batch, make_keys(6), recorder.nets, CONSISTENCY)
    student, teacher = asked(recorder)
    assert len(student) == 2 and len(teacher) == 2  # f at both ends; with and without text
    for call in teacher:
        np.testing.assert_array_equal(call.t, aux["time"])
        np.testing.assert_array_equal(call.x, teacher[0].x)
    assert {tuple(c.text.ravel()[:4]) for c in teacher} == {
        tuple(batch["text"].ravel()[:4]), tuple(NULL_TEXT.ravel()[:4])
    }
    now = next(c for c in student if np.array_equal(c.t, aux["time"]))
    then = next(c for c in student if c is not now)
    assert (then.t < now.t).all()
    expected, x_hat = by_hand(batch, now.x, now.t, then.t, CONSISTENCY["guidance"])
    np.testing.assert_allclose(then.x, x_hat, rtol=1e-9)  # the teacher's Euler step
    np.testing.assert_array_equal(now.x, teacher[0].x)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_array_equal(aux["consistency_loss"], loss)
    # the student is asked without guidance
    for call in student:
        np.testing.assert_array_equal(call.text, batch["text"])


@pytest.fixture(scope="module")
def many():
    """Everything the networks were asked for 1,024 samples on a grid of 8."""
    size = 1024
    batch, recorder = make_batch(size, dtype=np.float32), Recorder()
    student = jax.tree.map(np.float32, STUDENT)
    consistency.loss(student, SINGLE, batch, make_keys(size), recorder.nets, CONSISTENCY)
    return batch, *asked(recorder)


def test_mistake_5_teacher_is_asked_at_every_time_of_the_grid(many):
    _, student, teacher = many
    grid = np.asarray(time_grid(CONSISTENCY["steps"], CONSISTENCY["shift"]))
    times, counts = np.unique(teacher[0].t, return_counts=True)
    np.testing.assert_array_equal(times, grid[1:])  # t_1 .. t_N, not only T = 1
    expected = 1024 / 8
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()  # uniformly
    # the pair of times is always one interval of the grid
    now = next(c for c in student if np.array_equal(c.t, teacher[0].t))
    then = next(c for c in student if c is not now)
    np.testing.assert_array_equal(
        np.searchsorted(grid, then.t) + 1, np.searchsorted(grid, now.t)
    )


def test_mistake_5_teacher_sees_noisy_data_not_only_noise(many):
    batch, _, teacher = many
    t = teacher[0].t[:, None, None, None, None]
    z = (teacher[0].x - (1 - t) * batch["x"]) / t
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    left = teacher[0].x - t * z
    np.testing.assert_allclose(left, (1 - t) * batch["x"], atol=1e-5)
    per_time = [z[teacher[0].t == s].std() for s in np.unique(teacher[0].t)]
    np.testing.assert_allclose(per_time, 1, atol=0.15)


def test_boundary_f_of_x_at_zero_is_x(x64):
    """On a one-step grid t_n = 0: the target is x_hat itself, whatever the student says there."""
    batch, keys = make_batch(), make_keys()
    config = CONSISTENCY | {"steps": 1}

    def wild_at_zero(params, x, t, text, mask):
        at_zero = (t == 0)[:, None, None, None, None]
        return velocity(params, x, t, text, mask) + 1e3 * at_zero

    plain, aux = consistency.loss(STUDENT, FROZEN, batch, keys, NETS, config)
    wild, _ = consistency.loss(STUDENT, FROZEN, batch, keys, Nets(wild_at_zero), config)
    np.testing.assert_array_equal(aux["time"], 1)
    np.testing.assert_array_equal(plain, wild)
    recorder = Recorder()
    consistency.loss(STUDENT, FROZEN, batch, keys, recorder.nets, config)
    z = asked(recorder)[1][0].x  # at t = 1 pure noise
    v = velocity(STUDENT, z, np.ones(3), batch["text"], batch["text_mask"], xp=np)
    _, x_hat = by_hand(batch, z, np.ones(3), np.zeros(3), config["guidance"])
    np.testing.assert_allclose(plain, ((z - v - x_hat) ** 2).reshape(3, -1).mean(1), rtol=1e-9)


def test_a_student_that_solves_the_teachers_field_has_no_loss(x64):
    """Constant velocity: every f(x_t, t) is the same end, so the true student has no loss."""
    direction = np.linspace(-1, 1, 8).reshape(1, 1, 2, 2, 2)
    field = lambda params, x, *_: params["speed"] * direction + 0 * x  # noqa: E731
    frozen = FROZEN | {"teacher": {"speed": np.float64(2.0)}}

    def run(speed):
        student = {"speed": np.float64(speed)}
        return consistency.loss(
            student, frozen, make_batch(), make_keys(), Nets(field), CONSISTENCY
        )[0]

    np.testing.assert_allclose(run(2.0), 0, atol=1e-12)
    assert (run(1.0) > 1e-6).all()


def frozen_target(params, target_params, frozen, batch, keys):
    """The loss with the target's student given apart: what stop_grad means."""
    recorder = Recorder()
    _, aux = consistency.loss(target_params, frozen, batch, keys, recorder.nets, CONSISTENCY)
    student, _ = asked(recorder)
    now = next(c for c in student if np.array_equal(c.t, aux["time"]))
    then = next(c for c in student if c is not now)
    target = then.x - column(then.t) * velocity(
        target_params, then.x, then.t, batch["text"], batch["text_mask"], xp=np
    )

    def value(p):
        v = velocity(p, now.x, now.t, batch["text"], batch["text_mask"])
        return ((now.x - column(now.t) * v - target) ** 2).reshape(len(now.t), -1).mean(1).sum()

    return value


def test_gradient_in_float64(x64):
    """Central differences with the target held still, since its gradient is stopped."""
    batch, keys = make_batch(), make_keys()
    held = frozen_target(STUDENT, STUDENT, FROZEN, batch, keys)
    check_gradient(held, STUDENT)
    loss = sum_of(consistency.loss)
    gradient = jax.grad(lambda p: loss(p, FROZEN, batch, keys, NETS, CONSISTENCY))(STUDENT)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10),
        gradient, jax.grad(held)(STUDENT),
    )


def test_samples_are_independent_and_draws_belong_to_keys():
    batch, keys = make_batch(4, dtype=np.float32), make_keys(4)
    student = jax.tree.map(np.float32, STUDENT)
    run = jax.jit(lambda b, k: consistency.loss(student, SINGLE, b, k, NETS, CONSISTENCY)[0])
    whole = run(batch, keys)
    halves = [run(part_of(batch, s), keys[s]) for s in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(whole, jnp.concatenate(halves), rtol=1e-5)
