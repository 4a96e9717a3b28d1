"""RMSProp against PyTorch's numbers; D's backbone modes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from apt_jax.train.optimizers import discriminator_optimizer, generator_optimizer

# torch.optim.RMSprop([p], lr=1e-2, alpha=0.9, eps=1e-8), torch 2.13.0, from p = [0.5, -1, 2] with
# gradients [sin(i + 1), 0.1 cos(2 i), 1e-7 (i + 1)], after 1 and after 20 steps.
TORCH_1 = [0.4683772325515747, -1.0316227674484253, 1.975974678993225]
TORCH_20 = [0.46256762742996216, -1.0235886573791504, 1.633554458618164]


def torch_gradient(i):
    return jnp.array([np.sin(i + 1.0), 0.1 * np.cos(2.0 * i), 1e-7 * (i + 1)], jnp.float32)


def test_rmsprop_equals_torch_over_20_steps():
    tx = generator_optimizer(tiny_config(optimizer__learning_rate=1e-2))
    params = jnp.array([0.5, -1.0, 2.0], jnp.float32)
    state = tx.init(params)
    for i in range(20):
        updates, state = tx.update(torch_gradient(i), state, params)
        params = optax.apply_updates(params, updates)
        if i == 0:
            np.testing.assert_allclose(params, TORCH_1, rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(params, TORCH_20, rtol=1e-6, atol=1e-6)


def test_first_rmsprop_update_is_3_16_learning_rates():
    tx = generator_optimizer(tiny_config(optimizer__learning_rate=1e-3))
    params = jnp.zeros(4)
    updates, _ = tx.update(jnp.array([1.0, -2.0, 0.3, 50.0]), tx.init(params), params)
    np.testing.assert_allclose(np.abs(updates), 1e-3 / np.sqrt(0.1), rtol=1e-5)


def five_updates(config):
    """Sizes of the first five updates of one weight 1 whose gradient is 1."""
    tx = generator_optimizer(config)
    params = jnp.ones(1)
    state, sizes = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update(jnp.ones(1), state, params)
        sizes.append(-float(updates[0]))
    return sizes


def test_adamw_warms_up_and_decays():
    config = tiny_config(optimizer__name="adamw", optimizer__learning_rate=1e-2,
                         optimizer__warmup_steps=4, optimizer__weight_decay=0.1)
    # Adam's update of a constant gradient is 1, the decay adds 0.1 times the weight.
    np.testing.assert_allclose(five_updates(config), np.array([0.25, 0.5, 0.75, 1, 1]) * 1.1e-2, rtol=1e-4)


def test_the_rate_falls_linearly_to_its_last_part():
    config = tiny_config(optimizer__name="adamw", optimizer__learning_rate=1e-2,
                         optimizer__final_rate=0.2, train__steps=5)
    np.testing.assert_allclose(five_updates(config), np.array([1, 0.8, 0.6, 0.4, 0.2]) * 1e-2, rtol=1e-4)


PARAMS = {"backbone": {"blocks": {"w": np.ones((2, 3), np.float32)}},
          "heads": {"q": np.ones((2, 3), np.float32)}, "logit": np.ones(3, np.float32)}


@pytest.mark.parametrize(("mode", "expected"), [("train", 1.0), ("frozen", 0.0), ("rate", 0.25)])
def test_backbone_modes_scale_its_updates_only(mode, expected):
    config = tiny_config("adversarial", discriminator__backbone=mode,
                         discriminator__backbone_rate=0.25,
                         optimizer__learning_rate=1e-2,
                         optimizer__discriminator_learning_rate=1e-3)
    tx = discriminator_optimizer(config)
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = tx.update(params, tx.init(params), params)
    full = 1e-3 / np.sqrt(0.1)
    np.testing.assert_allclose(updates["heads"]["q"], -full, rtol=1e-5)
    np.testing.assert_allclose(updates["logit"], -full, rtol=1e-5)
    np.testing.assert_allclose(updates["backbone"]["blocks"]["w"], -full * expected, rtol=1e-5)


def test_a_frozen_backbone_has_no_moments():
    tx = discriminator_optimizer(tiny_config("adversarial", discriminator__backbone="frozen"))
    state = tx.init(jax.tree.map(jnp.asarray, PARAMS))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 6 + 3
