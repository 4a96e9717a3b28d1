"""The compiled steps: accumulation, padding, keys, backbone modes, alternation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config

from apt_jax.config import validate
from apt_jax.parallel.mesh import check_batch, make_mesh
from apt_jax.train.feeding import put_batch
from apt_jax.train.state import init_state, set_up
from apt_jax.train.steps import build_update, gradient, sample_keys

pytestmark = pytest.mark.slow


def start(config, devices=None):
    """(state, update, mesh), every parameter moved off its zero initialisation."""
    mesh = make_mesh(config.mesh, devices)
    setup = set_up(config, mesh, min_elements=1)
    state = init_state(config, setup)
    update = build_update(config, setup.nets, setup.optimizers, mesh, setup.shardings)
    return wake(state), update, mesh


def wake(state):
    """Zero-initialised layers would hide most of a gradient: adds small fixed noise everywhere."""
    rng = np.random.default_rng(0)
    for name in ("generator", "generator_ema", "discriminator"):
        if name in state:
            state[name] = jax.tree.map(
                lambda p: jax.device_put(
                    np.asarray(p) + 0.1 * rng.normal(size=p.shape).astype(np.float32),
                    p.sharding), state[name])
    return state


def host(tree):
    return jax.tree.map(np.array, tree)


def relative_difference(a, b):
    """|a - b| / |b| over whole trees."""
    squares = lambda tree: sum(float((np.asarray(x, np.float64) ** 2).sum())  # noqa: E731
                               for x in jax.tree.leaves(tree))
    return np.sqrt(squares(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, a, b))
                   / squares(b))


def linear_loss(params, batch, keys):
    """A loss that reads the batch and draws from the keys."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)  # [b, 4]
    value = ((batch["x"] + noise) @ params["w"]) ** 2
    return value, {"value": value, "noise": noise[:, 0]}


@pytest.mark.parametrize(("devices", "accumulate"), [(8, 0), (1, 4)])
def test_a_filled_up_batch_is_the_same_update(devices, accumulate):
    """15 samples on one device, and 15 with an empty one, one at a time for each of 8 devices or in
    four microbatches on one."""
    config = tiny_config(batch_size=15, optimizer__learning_rate=1e-5)
    config.mesh.fsdp = 1
    state, update, mesh = start(config, jax.devices()[:1])
    batch = tiny_batch(15)
    want, metrics = update(state, {}, put_batch(batch, mesh))
    config.mesh.fsdp, config.train.accumulate = devices, accumulate
    state, update, mesh = start(validate(config), jax.devices()[:devices])
    empty = check_batch(mesh, 15, accumulate) - 15
    assert empty == 1
    filled = {name: np.concatenate([value, np.zeros_like(value[:empty])])
              for name, value in batch.items()}
    filled["text_mask"][15:, 0] = True
    got, found = update(state, {}, put_batch(filled, mesh, accumulate))
    assert relative_difference(host(got["generator"]), host(want["generator"])) < 1e-6
    for name in ("loss", "gradient_norm"):
        assert float(found[name]) == pytest.approx(float(metrics[name]), rel=1e-5)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulation_equals_the_big_batch(microbatches):
    mesh = make_mesh({"replica": 2, "fsdp": -1})
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(32, 4)).astype(np.float32),
             "loss_mask": (np.arange(32) < 27).astype(np.float32)}
    params = {"w": jnp.arange(4.0)}
    shardings = jax.tree.map(
        lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), params)
    keys = sample_keys(jax.random.key_data(jax.random.key(3)), jnp.int32(5), 1, 32)

    def run(parts):
        return jax.jit(lambda p, b, k: gradient(
            linear_loss, p, b, k, microbatches=parts, mesh=mesh, shardings=shardings))(
            params, batch, keys)

    (one, one_metrics), (many, many_metrics) = run(1), run(microbatches)
    np.testing.assert_allclose(many["w"], one["w"], rtol=1e-5)
    assert set(one_metrics) == {"loss", "value", "noise", "gradient_norm"}
    for name in one_metrics:
        np.testing.assert_allclose(many_metrics[name], one_metrics[name], rtol=1e-5, atol=1e-6)
    # and both are the mean over the samples that are no padding
    loss, _ = linear_loss(params, batch, keys)
    np.testing.assert_allclose(one_metrics["loss"], np.asarray(loss)[:27].mean(), rtol=1e-5)


def test_padding_changes_no_gradient():
    mesh = make_mesh({"replica": 1, "fsdp": 1}, jax.devices()[:1])
    config = tiny_config(mesh__fsdp=1)
    batch = tiny_batch(padded=3)
    other = {**batch, "x": batch["x"].copy(), "text": batch["text"].copy()}
    other["x"][-3:], other["text"][-3:] = 5.0, -3.0
    state, update, _ = start(config, jax.devices()[:1])
    state, again = host(state), jax.tree.map(jnp.array, host(state))
    first, _ = update(jax.tree.map(jnp.asarray, state), {}, put_batch(batch, mesh))
    second, _ = update(again, {}, put_batch(other, mesh))
    jax.tree.map(np.testing.assert_array_equal, host(first), host(second))


def test_keys_depend_on_step_tag_and_sample_only():
    key = jax.random.key_data(jax.random.key(0))
    draw = lambda step, tag, size: np.asarray(  # noqa: E731
        jax.random.key_data(sample_keys(key, jnp.int32(step), tag, size)))
    base = draw(1, 0, 8)
    assert len({tuple(k) for k in base}) == 8
    np.testing.assert_array_equal(base, draw(1, 0, 8))
    assert not (base == draw(2, 0, 8)).all(axis=1).any()
    assert not (base == draw(1, 1, 8)).all(axis=1).any()


def two_updates(mode):
    """(state before, state after, metrics) of the adversarial stage on one device, on the host."""
    config = tiny_config("adversarial", discriminator__backbone=mode, mesh__fsdp=1)
    state, update, mesh = start(config, jax.devices()[:1])
    before = host(state)
    for i in range(2):
        with jax.transfer_guard("disallow"):
            batch = put_batch(tiny_batch(seed=i), mesh)
            state, metrics = update(state, {}, batch)
    return before, host(state), jax.device_get(metrics)


def still_parts(before, after):
    """Paths of the parameters that did not move."""
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    return [jax.tree_util.keystr(path) for path, s in jax.tree_util.tree_leaves_with_path(same)
            if s]


def test_an_adversarial_update_moves_both_networks(monkeypatch):
    asked = []
    monkeypatch.setattr("apt_jax.objectives.adversarial.shown",
                        lambda keys, x, config, step: asked.append(step) or x)
    before, after, metrics = two_updates("train")
    assert after["step"] == 2
    np.testing.assert_array_equal(before["key"], after["key"])
    for part in ("generator", "discriminator", "generator_ema"):
        still = still_parts(before[part], after[part])
        # What the last block does to its text stream reaches no output.
        assert all("text" in path for path in still), still
    assert not np.array_equal(after["generator"]["proj_out"]["bias"],
                              after["generator_ema"]["proj_out"]["bias"])
    assert metrics["discriminator/finite"] == metrics["generator/finite"] == 1.0
    # Both steps tell what D is shown how many updates are done (`augment_after`).
    assert len(asked) >= 3 and all(isinstance(step, jax.core.Tracer) and step.shape == ()
                                   and step.dtype == jnp.int32 for step in asked)


def test_a_frozen_backbone_stays_bit_equal_while_heads_and_generator_move():
    before, after, _ = two_updates("frozen")
    jax.tree.map(np.testing.assert_array_equal, before["discriminator"]["backbone"],
                 after["discriminator"]["backbone"])
    for part in ("heads", "logit"):
        assert not still_parts(before["discriminator"][part], after["discriminator"][part])
    # Mistake 1 of method.md: G must still get its gradient, through the backbone that D keeps.
    assert not still_parts(before["generator"]["proj_out"], after["generator"]["proj_out"])
