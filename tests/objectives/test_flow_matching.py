"""Stage 0's loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from toys import (
    FLOW,
    NETS,
    Recorder,
    check_gradient,
    make_batch,
    make_keys,
    parameters,
    part_of,
    sum_of,
    velocity,
)

from apt_jax.objectives import flow_matching


def test_value_by_hand(x64):
    """|| v(x_t, t, c) - (z - x) ||^2, mean over the sample; z is found from what v was asked."""
    params, batch, recorder = parameters("velocity"), make_batch(), Recorder()
    loss, aux = flow_matching.loss(params, {}, batch, make_keys(), recorder.nets, FLOW)
    [call] = recorder.of("velocity")
    np.testing.assert_array_equal(call.text, batch["text"])
    np.testing.assert_array_equal(call.mask, batch["text_mask"])
    t = call.t.astype(np.float64)[:, None, None, None, None]
    x, x_t = batch["x"], call.x
    z = (x_t - (1 - t) * x) / t
    v = velocity(params, x_t, call.t, batch["text"], batch["text_mask"], xp=np)
    np.testing.assert_allclose(loss, ((v - (z - x)) ** 2).reshape(3, -1).mean(1), rtol=1e-6)
    np.testing.assert_array_equal(aux["flow_loss"], loss)


def test_noise_is_standard_normal_and_time_in_the_unit_interval():
    batch, recorder = make_batch(2048, dtype=np.float32), Recorder()
    params = parameters("velocity", dtype=np.float32)
    flow_matching.loss(params, {}, batch, make_keys(2048), recorder.nets, FLOW)
    [call] = recorder.of("velocity")
    assert 0 < call.t.min() and call.t.max() < 1
    u = call.t / (FLOW["shift"] - (FLOW["shift"] - 1) * call.t)  # Eq. 7 undone
    logit = np.log(u / (1 - u))
    assert abs(logit.mean() - FLOW["logit_mean"]) < 0.1
    assert abs(logit.std() - FLOW["logit_std"]) < 0.1
    late = call.t > 0.2  # dividing by a small t would only magnify rounding
    t = call.t[:, None, None, None, None]
    z = ((call.x - (1 - t) * batch["x"]) / t)[late]
    assert abs(z.mean()) < 0.04 and abs(z.std() - 1) < 0.04


def test_gradient_in_float64(x64):
    batch, keys = make_batch(), make_keys()
    check_gradient(
        lambda p: sum_of(flow_matching.loss)(p, {}, batch, keys, NETS, FLOW), parameters("velocity")
    )


def test_samples_are_independent_and_draws_belong_to_keys():
    params = parameters("velocity", dtype=np.float32)
    batch, keys = make_batch(4, dtype=np.float32), make_keys(4)
    run = jax.jit(lambda b, k: flow_matching.loss(params, {}, b, k, NETS, FLOW)[0])
    whole = run(batch, keys)
    halves = [run(part_of(batch, s), keys[s]) for s in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(whole, jnp.concatenate(halves), rtol=1e-5)
