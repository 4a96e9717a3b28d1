"""What D is shown: each change against numpy, and that both steps show real and generated alike."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from toys import ADVERSARIAL, SHAPE, Recorder, make_batch, make_keys, parameters

from apt_jax.objectives import adversarial
from apt_jax.objectives.augment import shown

COUNT, FRAMES, HEIGHT, WIDTH = 600, 2, 8, 16
KEYS = jax.random.split(jax.random.key(5), COUNT)


def changed(x, **amounts):
    config = ADVERSARIAL | amounts
    return np.asarray(jax.jit(lambda x: shown(KEYS[: len(x)], x, config))(x))


@pytest.fixture(scope="module")
def samples():
    shape = (COUNT, FRAMES, HEIGHT, WIDTH, 3)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def test_nothing_asked_is_the_sample_itself(samples):
    assert shown(KEYS, samples, ADVERSARIAL) is samples


def test_moves_are_whole_and_all_of_them_happen(samples):
    """1/8 of 8 x 16: one row, two columns either way; all frames alike; edges repeated."""
    seen, out = {}, changed(samples, translate=0.125)
    for rows, columns in itertools.product(range(-1, 2), range(-2, 3)):
        moved = samples[:, :, np.clip(np.arange(HEIGHT) + rows, 0, HEIGHT - 1)]
        moved = moved[:, :, :, np.clip(np.arange(WIDTH) + columns, 0, WIDTH - 1)]
        seen[rows, columns] = (moved == out).all(axis=(1, 2, 3, 4)).sum()
    assert sum(seen.values()) == COUNT
    assert min(seen.values()) > COUNT / 15 / 2 and max(seen.values()) < COUNT / 15 * 2


def test_a_hole_is_one_rectangle_of_zeros_in_all_frames(samples):
    out = changed(samples, cutout=0.5)
    gone = (out == 0).all(axis=(1, 4))
    np.testing.assert_array_equal(out, np.where(gone[:, None, :, :, None], 0, samples))
    rows, columns = gone.any(axis=2), gone.any(axis=1)
    np.testing.assert_array_equal(gone, rows[:, :, None] & columns[:, None, :])
    for cut, size in ((rows, HEIGHT), (columns, WIDTH)):
        edges = np.diff(np.pad(cut, ((0, 0), (1, 1))).astype(int), axis=1)
        assert (np.abs(edges).sum(1) == 2).all()
        assert cut.sum(1).max() == size // 2 and cut.sum(1).min() >= size // 4
        assert cut.any(axis=0).all()  # no place is safe


def test_colours_by_hand(samples):
    """Brightness by up to a half, saturation from 0 to 2, contrast from a half to one and a half."""
    out = changed(samples, color=1.0)
    saturations, contrasts, brightness = [], [], []
    for x, y in zip(samples[:200].astype(np.float64), out):
        grey, mean = x.mean(-1, keepdims=True), x.mean()
        basis = np.stack([(x - grey).ravel(), (grey - mean + 0 * x).ravel(), np.ones(x.size)], 1)
        (colour, light, level), *_ = np.linalg.lstsq(basis, y.ravel(), rcond=None)
        np.testing.assert_allclose(basis @ [colour, light, level], y.ravel(), atol=1e-5)
        saturations.append(colour / light)
        contrasts.append(light)
        brightness.append(level - mean)
    for values, low, high in ((saturations, 0, 2), (contrasts, 0.5, 1.5), (brightness, -0.5, 0.5)):
        assert low - 1e-5 <= min(values) < low + 0.1 * (high - low)
        assert high + 1e-5 >= max(values) > high - 0.1 * (high - low)
    assert abs(np.corrcoef(saturations, contrasts)[0, 1]) < 0.25


@pytest.mark.parametrize("name, axis", [("mirror", 3), ("backwards", 1)])
def test_turned_around_so_much_of_the_time(samples, name, axis):
    out = changed(samples, **{name: 0.3})
    as_it_was, turned = ((out == x).all(axis=(1, 2, 3, 4))
                         for x in (samples, np.flip(samples, axis)))
    assert (as_it_was ^ turned).all()
    assert abs(turned.mean() - 0.3) < 0.08  # four deviations of 600 draws


def test_turned_both_ways_and_moved_each_on_its_own(samples):
    out = changed(samples, translate=0.125, mirror=0.4, backwards=0.4)
    moved = changed(samples, translate=0.125)  # which draws the same moves with more changes behind
    made = [np.flip(moved, axes) for axes in ((), (3,), (1,), (1, 3))]
    found = np.array([(out == x).all(axis=(1, 2, 3, 4)) for x in made])
    assert (found.sum(0) == 1).all()
    np.testing.assert_allclose(found.mean(1), [0.36, 0.24, 0.24, 0.16], atol=0.08)


def test_real_twin_and_generated_are_all_moved_before_d_sees_them():
    """The twin is the moved sample plus sigma eps; real and generated move on their own."""
    size, sigma = 256, 0.01
    config = ADVERSARIAL | {"translate": 0.5, "r1_sigma": sigma}
    G, D = (jax.tree.map(np.float32, parameters(kind, 1)) for kind in ("velocity", "discriminate"))
    batch, recorder = make_batch(size, dtype=np.float32), Recorder()
    adversarial.discriminator_loss(D, {"generator": G}, batch, make_keys(size), recorder.nets,
                                   config)
    real, fake, twin = recorder.of("discriminate")
    assert abs((twin.x - real.x).std() / sigma - 1) < 0.1

    def move_of(seen, sample):
        """Index of the move that made `seen` of `sample`, [size]."""
        found = []
        for rows, columns in itertools.product((-1, 0, 1), repeat=2):
            moved = sample[:, :, np.clip(np.arange(SHAPE[1]) + rows, 0, SHAPE[1] - 1)]
            moved = moved[:, :, :, np.clip(np.arange(SHAPE[2]) + columns, 0, SHAPE[2] - 1)]
            found.append(np.isclose(moved, seen, atol=1e-5).all(axis=(1, 2, 3, 4)))
        assert np.any(found, axis=0).all()
        return np.argmax(found, axis=0)

    [call] = recorder.of("velocity")
    made = np.asarray(adversarial.one_step(
        lambda *a: recorder.nets.velocity(G, *a), call.x, batch["text"], batch["text_mask"]))
    moves = move_of(real.x, batch["x"]), move_of(fake.x, made)
    assert all(len(np.unique(m)) == 9 for m in moves)
    assert (moves[0] == moves[1]).mean() < 0.25  # chance is 1/9

    recorder.calls.clear()
    adversarial.generator_loss(G, {"discriminator": D}, batch, make_keys(size), recorder.nets,
                               config)
    [call], [seen] = recorder.of("velocity"), recorder.of("discriminate")
    made = np.asarray(adversarial.one_step(
        lambda *a: recorder.nets.velocity(G, *a), call.x, batch["text"], batch["text_mask"]))
    assert len(np.unique(move_of(seen.x, made))) == 9


def test_colours_and_holes_may_begin_late(samples):
    """Moves are there from the start, and what begins is what a run without the field has."""
    amounts = {"translate": 0.125, "cutout": 0.5, "color": 0.5}
    config, plain = ADVERSARIAL | amounts | {"augment_after": 10}, ADVERSARIAL | amounts
    late = jax.jit(lambda x, step: shown(KEYS, x, config, step))
    before, after = (np.asarray(late(samples, np.int32(step))) for step in (9, 10))
    np.testing.assert_array_equal(after, jax.jit(lambda x: shown(KEYS, x, plain, 0))(samples))
    assert len(np.unique(samples)) > 1e5 and np.isin(before, samples).all()  # moved, nothing else
    assert (before != samples).any(axis=(1, 2, 3, 4)).mean() > 0.8
    assert not np.isin(after, samples).all()


def test_both_losses_hand_on_the_step(monkeypatch):
    steps = []
    monkeypatch.setattr(adversarial, "shown", lambda keys, x, config, step: steps.append(step) or x)
    batch, keys, nets = make_batch(dtype=np.float32), make_keys(), Recorder().nets
    G, D = (jax.tree.map(np.float32, parameters(kind, 1)) for kind in ("velocity", "discriminate"))
    adversarial.discriminator_loss(D, {"generator": G, "step": 7}, batch, keys, nets, ADVERSARIAL)
    adversarial.generator_loss(G, {"discriminator": D, "step": 7}, batch, keys, nets,
                               ADVERSARIAL | {"loss": "relativistic"})
    assert steps == [7] * 4
