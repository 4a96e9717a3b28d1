"""Losses and gradients of one D and one G step are the same however the mesh is cut."""

import jax
import numpy as np
import pytest
from test_steps import host, relative_difference, wake
from tiny import tiny_batch, tiny_config

from apt_jax.objectives import adversarial
from apt_jax.parallel.mesh import make_mesh
from apt_jax.train.loop import put_batch
from apt_jax.train.state import init_state, set_up
from apt_jax.train.steps import gradient, sample_keys


@pytest.fixture(scope="module")
def weights():
    """One set of start weights, made on one device, as numpy."""
    config = tiny_config("adversarial")
    setup = set_up(config, make_mesh(config.mesh, jax.devices()[:1]))
    return host(wake(init_state(config, setup)))


def losses_and_gradients(replica, fsdp, weights, microbatches=1):
    """((gradients, metrics) of the D step, the same of the G step), on the host.

    sigma is the videos' 0.1: at 0.01 the penalty is the square of a difference of nearly equal
    logits, and float32 rounding alone moves its gradient by 1e-5.
    """
    config = tiny_config("adversarial", batch_size=16, objective__adversarial__r1_sigma=0.1)
    mesh = make_mesh({"replica": replica, "fsdp": fsdp}, jax.devices()[: replica * fsdp])
    setup = set_up(config, mesh, min_elements=1)
    state = jax.device_put(weights, setup.shardings)
    if fsdp > 1:
        cut = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
        assert len(cut) > 100, "the mesh is there, but nothing is sharded over it"
    options, nets = config.objective.adversarial, setup.nets

    batch = put_batch(tiny_batch(16, padded=3), mesh)

    def run(loss, name, other, tag):
        @jax.jit
        def step(state, batch):
            keys = sample_keys(state["key"], state["step"], tag, batch["x"].shape[0])
            return gradient(
                lambda p, b, k: loss(p, {other: state[other]}, b, k, nets, options), state[name],
                batch, keys, microbatches=microbatches, mesh=mesh, shardings=setup.shardings[name])
        return host(step(state, batch))

    return (run(adversarial.discriminator_loss, "discriminator", "generator", 1),
            run(adversarial.generator_loss, "generator", "discriminator", 0))


@pytest.fixture(scope="module")
def one_device(weights):
    return losses_and_gradients(1, 1, weights)


@pytest.mark.parametrize(("replica", "fsdp", "microbatches"), [
    (8, 1, 1), (2, 4, 2), (1, 8, 1)])
def test_every_mesh_equals_one_device(replica, fsdp, microbatches, weights, one_device):
    found = losses_and_gradients(replica, fsdp, weights, microbatches)
    for (gradients, metrics), (want, want_metrics) in zip(found, one_device, strict=True):
        assert relative_difference(gradients, want) < 1e-5
        assert metrics["gradient_norm"] > 1e-2
        for name, value in want_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=2e-6)
