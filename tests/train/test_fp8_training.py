"""model.matmul = "fp8": updates of D, which also run G, with the blocks' products in eight bits."""

import jax
import numpy as np
from tiny import tiny_batch, tiny_config

from apt_jax.parallel.mesh import make_mesh
from apt_jax.train.feeding import put_batch
from apt_jax.train.state import init_state, set_up
from apt_jax.train.steps import build_steps


def test_d_trains_in_eight_bits():
    """D moves as a whole, masters stay float32, and it learns to tell a fixed batch."""
    config = tiny_config("adversarial", init__generator="", init__diffusion="", model__depth=1,
                         discriminator__taps=(1,), model__matmul="fp8",
                         discriminator__matmul="fp8", model__dtype="bfloat16", model__remat="full",
                         optimizer__learning_rate=3e-3)
    mesh = make_mesh({"replica": 1, "fsdp": 1}, jax.devices()[:1])
    setup = set_up(config, mesh)
    state, rng = init_state(config, setup), np.random.default_rng(0)
    wake = lambda p: p + (0.1 * rng.normal(size=p.shape)).astype(np.float32)  # noqa: E731
    for name in ("generator", "discriminator"):
        state[name] = jax.tree.map(wake, state[name])
    before = jax.tree.map(np.array, state["discriminator"])
    step = build_steps(config, setup.nets, setup.optimizers, mesh, setup.shardings)["discriminator"]
    batch = put_batch(tiny_batch(), mesh)
    text = step.lower(state, {}, batch).as_text()
    assert "f8E4M3FN" in text and "f8E5M2" in text  # forward and gradient

    losses = []
    for _ in range(6):
        state, metrics = step(state, {}, batch)
        assert metrics["finite"] == 1.0
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state["discriminator"]),
                                jax.tree.leaves(before)):
        assert new.dtype == np.float32
        # what the last block does to its text stream reaches no output
        assert not np.array_equal(new, old) or "text" in jax.tree_util.keystr(path), path
