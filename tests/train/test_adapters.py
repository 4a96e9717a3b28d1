"""Training adapters: what the state holds, what moves, what comes out; runs that go on."""

import jax
import numpy as np
import pytest
from test_steps import relative_difference
from tiny import emoji_config, random_weights, tiny_batch, tiny_config

from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.nn import lora
from apt_jax.parallel.mesh import make_mesh, replicated
from apt_jax.train.feeding import put_batch
from apt_jax.train.loop import train
from apt_jax.train.state import frozen_inputs, init_state, set_up
from apt_jax.train.steps import build_update
from apt_jax.weights import (
    adapted_run,
    base_of_adapters,
    flatten,
    load_adapters,
    load_generator,
)

pytestmark = pytest.mark.slow
RANK = {"lora__rank": 2, "lora__alpha": 4.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("base") / "weights")


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32), tree)


def test_an_adapted_network_by_hand():
    """It begins as its base, merging changes nothing, and the scale is alpha over rank."""
    config = tiny_config(**RANK)
    net, plain = make_generator(config.model, config.lora), make_generator(config.model)
    adapters, base = lora.split(net.abstract())
    assert flatten(base).keys() == flatten(plain.abstract()).keys()
    names = {name.rsplit("/", 1)[0] for name in flatten(adapters)}
    blocks = "backbone/blocks"
    assert names == {f"{blocks}/{side}/{part}" for side in ("video", "text")
                     for part in ("qkv", "out", "mlp/up", "mlp/down")}
    base, adapters = random_like(base), random_like(adapters, 1)
    batch = tiny_batch(2)
    inputs = (batch["x"], np.array([0.3, 0.9], np.float32), batch["text"], batch["text_mask"])
    run = jax.jit(net)
    start, _ = lora.split(jax.jit(net.init)(jax.random.key(0)))
    assert not any(v.any() for k, v in flatten(start).items() if k.endswith("lora_b"))
    np.testing.assert_array_equal(run(lora.join(base, start), *inputs),
                                  run(lora.join(base, jax.tree.map(np.zeros_like, start)), *inputs))
    full = lora.join(base, adapters)
    merged = lora.merge(full, 2.0)
    assert flatten(merged).keys() == flatten(base).keys()
    a = np.asarray(run(full, *inputs))
    b = np.asarray(jax.jit(plain)(merged, *inputs))
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
    changed = flatten(merged)[f"{blocks}/video/mlp/up/kernel"][1]
    leaf = {k: v[1] for k, v in flatten(full).items() if "blocks/video/mlp/up" in k}
    up = f"{blocks}/video/mlp/up"
    np.testing.assert_allclose(changed, leaf[f"{up}/kernel"] + 2 * leaf[f"{up}/lora_a"]
                               @ leaf[f"{up}/lora_b"], rtol=1e-5)


@pytest.mark.parametrize("discriminator", [False, True])
def test_the_state_holds_only_what_trains(discriminator):
    config = tiny_config("adversarial", **RANK, lora__discriminator=discriminator,
                         init__generator="g", init__diffusion="d")
    setup = set_up(config, make_mesh({"replica": 2, "fsdp": 4}), min_elements=8)
    whole = set_up(tiny_config("adversarial", init__generator="g", init__diffusion="d"),
                   make_mesh({"replica": 2, "fsdp": 4}), min_elements=8)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    for name in ("generator", "generator_ema", "generator_opt"):
        leaves = [k for k in flatten(setup.abstract["generator"])]
        assert all(k.endswith(("lora_a", "lora_b")) for k in leaves)
        assert size(setup.abstract[name]) < 0.3 * size(whole.abstract[name])
    found = flatten(setup.abstract["discriminator"])
    backbone = [k for k in found if k.startswith("backbone/")]
    assert any(k.startswith("heads/") for k in found) and "logit/kernel" in found
    if discriminator:
        assert backbone and all(k.endswith(("lora_a", "lora_b")) for k in backbone)
        assert set(setup.bases) == {"generator_base", "discriminator_base"}
    else:
        assert found.keys() == flatten(whole.abstract["discriminator"]).keys()
        assert set(setup.bases) == {"generator_base"}
    assert flatten(setup.plain()).keys() == flatten(whole.abstract["generator"]).keys()
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(setup.bases))


@pytest.fixture(scope="module")
def consistency(base, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "consistency")
    config = emoji_config("consistency", **RANK, init__diffusion=base)
    return config, train(config, folder, quiet=True) | {"folder": folder}


def test_a_consistency_run_trains_adapters_alone(base, consistency):
    config, result = consistency
    assert result["status"] == "complete" and result["metrics"]["loss"] > 0
    folder = result["folder"]
    run, adapters = load_adapters(folder, "raw")
    assert run.lora.rank == 2 and all(v.any() for v in flatten(adapters).values())
    before, after = load_generator(base)[1], load_generator(folder, "raw")[1]
    moved = {k for k, v in flatten(after).items() if not np.array_equal(v, flatten(before)[k])}
    assert moved == {f"{k.removesuffix('lora_a')}kernel" for k in flatten(adapters)
                     if k.endswith("lora_a")}
    want = lora.merge(lora.join(before, adapters), 2.0)
    jax.tree.map(np.testing.assert_array_equal, after, want)
    ema = load_adapters(folder, "ema")[1]
    assert not all(np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(ema), jax.tree.leaves(adapters), strict=True))


def test_an_interrupted_run_goes_on_bit_by_bit(consistency, tmp_path):
    import shutil

    config, result = consistency
    folder = tmp_path / "again"
    shutil.copytree(result["folder"], folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    assert train(config, folder, quiet=True)["step"] == 4
    for which in ("raw", "ema"):
        jax.tree.map(np.testing.assert_array_equal, load_adapters(folder, which)[1],
                     load_adapters(result["folder"], which)[1])
    other = emoji_config("consistency", **{**RANK, "lora__rank": 3},
                         init__diffusion=config.init.diffusion)
    with pytest.raises(UserError, match=r"lora\.rank = 2 there, 3 here"):
        train(other, folder, quiet=True)


def test_an_adversarial_run_goes_on_with_the_adapters(base, consistency, tmp_path):
    """Same rank: the same base, and the adapters continue; then weights load from the new run."""
    start = consistency[1]["folder"]
    config = emoji_config("adversarial", **RANK, lora__discriminator=True,
                          init__generator=start, init__diffusion=base, train__steps=2,
                          optimizer__learning_rate=1e-4)
    assert adapted_run(start, config.lora) is not None
    assert base_of_adapters(start, "ema", config.lora) == (base, "ema")
    assert train(config, tmp_path / "run", quiet=True)["status"] == "complete"
    before, after = load_adapters(start, "ema")[1], load_adapters(tmp_path / "run", "raw")[1]
    gaps = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after),
                                                strict=True)]
    assert all(0 < gap < 0.01 for gap in gaps)
    want = lora.merge(lora.join(load_generator(base)[1], after), 2.0)
    jax.tree.map(np.testing.assert_array_equal, load_generator(tmp_path / "run", "raw")[1], want)


def test_adapters_of_another_rank_start_from_merged_weights(consistency):
    start = consistency[1]["folder"]
    other = emoji_config(lora__rank=3).lora
    assert adapted_run(start, other) is None
    assert base_of_adapters(start, "raw", other) == (start, "raw")


@pytest.mark.parametrize(("fields", "says"), [
    ({"lora__rank": 2}, "names no base"),
    ({"lora__discriminator": True}, "lora.rank = 0"),
    ({"lora__rank": -1}, "lora.rank"),
    ({"lora__rank": 2, "lora__discriminator": True, "stage": "adversarial",
      "discriminator__backbone": "frozen", "init__generator": "bundled:base",
      "init__diffusion": "bundled:base"}, "nothing to train"),
])
def test_wrong_settings(fields, says):
    from apt_jax.config import validate

    with pytest.raises(UserError, match=says):
        validate(emoji_config(**fields))


def test_adapters_of_a_run_without_any(base):
    with pytest.raises(UserError, match="no run that trained adapters"):
        load_adapters(base)


def test_a_cut_mesh_trains_the_same_adapters(base):
    """One update over context and tensor axes equals that of one device."""
    # At the paper's eps RMSProp's first update is the sign of the gradient, also of its rounding.
    config = emoji_config("consistency", **RANK, init__diffusion=base, optimizer__eps=1e-2,
                          optimizer__learning_rate=1.0)
    found = []
    for sizes, devices in (({"replica": 1, "fsdp": 1}, 1),
                           ({"replica": 1, "fsdp": 2, "context": 2, "tensor": 2}, 8)):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        setup = set_up(config, mesh, min_elements=1)
        frozen = frozen_inputs(config, setup, np.zeros((3, 384), np.float32),
                               np.ones(3, bool), replicated(mesh))
        state = init_state(config, setup)
        start = random_like(setup.abstract["generator"], 5)
        state["generator"] = jax.device_put(start, setup.shardings["generator"])
        update = build_update(config, setup.nets, setup.optimizers, mesh, setup.shardings)
        batch = tiny_batch(8)
        batch["text"] = np.tile(batch["text"], (1, 1, 384 // batch["text"].shape[-1]))
        state, metrics = update(state, frozen, put_batch(batch, mesh))
        found.append(jax.device_get((state["generator"], metrics["gradient_norm"])))
    (one, norm), (cut, cut_norm) = found
    assert cut_norm == pytest.approx(norm, rel=1e-5) and norm > 0
    moved, cut_moved = (jax.tree.map(np.subtract, end, start) for end in (one, cut))
    assert relative_difference(one, start) > 1e-2
    assert relative_difference(cut_moved, moved) < 1e-5
