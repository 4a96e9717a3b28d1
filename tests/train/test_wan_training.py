"""A tiny Wan through whole runs of the loop: consistency distillation, then APT on clips."""

import jax
import numpy as np
import pytest
from tiny import emoji_config, tiny_batch

from apt_jax.config import validate
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.nn import lora
from apt_jax.parallel.mesh import make_mesh, replicated
from apt_jax.train.loop import train
from apt_jax.train.state import frozen_inputs, init_state, set_up
from apt_jax.weights import flatten, load_generator, save_generator

pytestmark = pytest.mark.slow
WAN = dict(model__family="wan", model__rope_axes=(4, 2, 2), model__text_tokens=8,
           model__frequency_width=16, train__log_every=1)


def wan_config(stage, **overrides):
    """The tiny config of this folder with Wan's network: width 16, text filled up to 8 states."""
    return emoji_config(stage, **{**WAN, **overrides})


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A weights folder of the "pre-trained" network, nothing at zero."""
    config, rng = wan_config("pretrain"), np.random.default_rng(0)
    params = jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape)).astype(np.float32),
                          make_generator(config.model).abstract())
    return str(save_generator(tmp_path_factory.mktemp("diffusion"), config.model, params))


def test_the_stages_follow_each_other(diffusion, tmp_path):
    consistency = str(tmp_path / "consistency")
    config = validate(wan_config("consistency", init__diffusion=diffusion, train__steps=3,
                                 data__frames=(1, 2), objective__consistency__steps=4))
    summary = train(config, consistency, quiet=True)
    assert summary["status"] == "complete" and np.isfinite(summary["metrics"]["loss"])
    _, teacher = load_generator(diffusion)
    model, student = load_generator(consistency, "raw")
    assert model.family == "wan"
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), teacher, student)
    assert min(jax.tree.leaves(moved)) > 0  # every parameter learns

    config = validate(wan_config("adversarial", init__diffusion=diffusion, train__steps=3,
                                 init__generator=consistency, data__frames=(2,),
                                 discriminator__taps=(1, 2), model__remat="full"))
    summary = train(config, tmp_path / "apt", quiet=True)
    metrics = summary["metrics"]
    assert {"discriminator/loss", "generator/loss", "discriminator/r1"} <= set(metrics)
    assert all(np.isfinite(v) for v in metrics.values())
    _, generator = load_generator(tmp_path / "apt", "raw")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), student, generator)
    assert min(jax.tree.leaves(moved)) > 0


def test_adapters_learn_in_generator_and_discriminator(diffusion):
    """APT's gradient through D into G reaches the adapter of every matrix of both; they begin at
    their bases."""
    config = validate(wan_config(
        "adversarial", init__generator=diffusion, init__diffusion=diffusion, lora__rank=2,
        lora__alpha=2.0, lora__discriminator=True, discriminator__taps=(1, 2)))
    mesh = make_mesh({"replica": 1, "fsdp": 1}, jax.devices()[:1])
    setup = set_up(config, mesh)
    state = init_state(config, setup)
    bases = frozen_inputs(config, setup, np.zeros(1), np.ones(1, bool), replicated(mesh))
    batch, t = tiny_batch(2), np.ones(2, np.float32)
    text = np.tile(batch["text"], (1, 1, 384 // batch["text"].shape[-1]))

    def loss(g, d):
        v = setup.generator(lora.join(bases["generator_base"], g), batch["x"], t, text,
                            batch["text_mask"])
        logits = setup.discriminator(lora.join(bases["discriminator_base"], d), batch["x"] - v,
                                     t / 2, text, batch["text_mask"])
        return jax.nn.softplus(-logits).sum()

    given = state["generator"], state["discriminator"]
    gradients = jax.jit(jax.grad(loss, (0, 1)))(*given)
    matrices = [*(f"{a}/{m}" for a in ("attn", "cross") for m in ("q", "k", "v", "out")),
                "mlp/up", "mlp/down"]
    adapters = {f"backbone/blocks/{m}/lora_{x}" for m in matrices for x in "ab"}
    for params, gradient, only in zip(map(flatten, given), map(flatten, gradients), (True, False)):
        assert {k for k in params if "backbone" in k} == adapters
        assert not only or params.keys() == adapters
        for name in adapters:  # B is zero, so that A's gradient is
            assert np.any(params[name]) == name.endswith("a") != np.any(gradient[name]), name


@pytest.mark.parametrize("override, says", [
    (dict(model__rope_axes=(2, 2, 4)), r"Wan cuts a head of 8 channels into \(4, 2, 2\)"),
    (dict(model__modulation="shared"), "model.modulation = 'shared' has no meaning"),
    (dict(data__max_text_tokens=9), "data.max_text_tokens = 9 is more than model.text_tokens = 8"),
    (dict(model__frequency_width=15), "must be even"),
    (dict(model__family="unet"), "model.family = 'unet' is not one of mmdit, wan"),
    (dict(model__family="mmdit", model__rope_axes=(2, 2, 4), model__frequency_width=256),
     "model.text_tokens = 8 has no meaning for model.family = 'mmdit'"),
])
def test_what_wan_cannot_do_is_said(override, says):
    with pytest.raises(UserError, match=says):
        validate(wan_config("pretrain", **override))
