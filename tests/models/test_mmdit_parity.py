"""The MMDiT equals diffusers' QwenImageTransformer2DModel: from files and, with torch, live."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from live import FIXTURES, live_reference
from networks import mmdit, relative_error
from reference_names import from_reference
from safetensors import safe_open

from apt_jax.models.mmdit import MMDiTConfig

FILES = sorted(FIXTURES.glob("qwen_image_*.safetensors"))
TOLERANCE = 2e-5  # the promise is 1e-4


def our_config(case: dict, **changes) -> MMDiTConfig:
    return MMDiTConfig(
        in_channels=case["in_channels"], out_channels=case["out_channels"], patch=(1, 2, 2),
        width=case["heads"] * case["head_dim"], depth=case["depth"], heads=case["heads"],
        head_dim=case["head_dim"], rope_axes=tuple(case["axes"]), text_width=case["text_width"],
        **changes,
    )


def check_shapes(params, net):
    """The converted tree is exactly ours, and float32."""
    chex.assert_trees_all_equal_shapes_and_dtypes(params, net.abstract())


@pytest.fixture(scope="module", params=FILES, ids=lambda p: p.stem.removeprefix("qwen_image_"))
def fixture(request):
    with safe_open(request.param, "np") as file:
        case = json.loads(file.metadata()["about"])["case"]
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    groups = {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("weights.", "inputs.")
    }
    return case, groups["weights."], groups["inputs."], tensors["output"]


def test_there_are_fixtures():
    assert len(FILES) >= 4
    assert all(f.stat().st_size < 1_500_000 for f in FILES)


def test_equals_the_reference(fixture, record_property):
    case, weights, inputs, expected = fixture
    net = mmdit(our_config(case))
    params = from_reference(weights, case["depth"])
    check_shapes(params, net)
    v = jax.jit(net)(params, inputs["x"], inputs["t"], inputs["text"], inputs["text_mask"])
    assert v.shape == expected.shape and v.dtype == np.float32
    assert np.linalg.norm(expected) > 1  # nothing is zero by initialisation
    error = relative_error(v, expected)
    record_property("relative_error", error)
    print(f"relative error {error:.2e}")
    assert error < TOLERANCE


def test_a_missing_or_unknown_reference_name_is_an_error(fixture):
    case, weights, _, _ = fixture
    with pytest.raises(KeyError):
        from_reference({k: v for k, v in weights.items() if k != "img_in.bias"}, case["depth"])
    with pytest.raises(ValueError, match="surplus"):
        from_reference(weights | {"surplus": np.zeros(1)}, case["depth"])


LIVE = [
    dict(seed=11, heads=4, head_dim=32, axes=(8, 12, 12), depth=6, text_width=64, grid=(1, 12, 7),
         in_channels=16, out_channels=16, text_lengths=(9, 20, 1), times=(0.0, 0.42, 1.0)),
    dict(seed=12, heads=3, head_dim=64, axes=(16, 24, 24), depth=4, text_width=48, grid=(5, 4, 9),
         in_channels=4, out_channels=6, text_lengths=(17, 3), times=(0.09, 0.93)),
    dict(seed=13, heads=2, head_dim=128, axes=(16, 56, 56), depth=2, text_width=32, grid=(3, 6, 5),
         in_channels=8, out_channels=8, text_lengths=(6, 6), times=(0.6, 0.3), use_mask=False),
]


@pytest.mark.parametrize("sizes", LIVE, ids=["image", "clip", "wide_heads"])
def test_equals_the_live_reference(sizes):
    reference = live_reference("torch_reference")
    case = reference.Case(**sizes)
    model, inputs = reference.random_model(case), reference.random_inputs(case)
    expected = reference.run(model, case, inputs)
    net = mmdit(our_config(dataclasses.asdict(case)))
    params = from_reference(reference.weights(model), case.depth)
    check_shapes(params, net)
    v = jax.jit(net)(params, inputs["x"], inputs["t"], inputs["text"], inputs["text_mask"])
    error = relative_error(v, expected)
    print(f"relative error {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("sizes", LIVE[:2], ids=["image", "clip"])
def test_bfloat16_is_no_further_off_than_the_references(sizes):
    """At times that bfloat16 holds exactly: the reference rounds them, which would count double."""
    reference = live_reference("torch_reference")
    case = reference.Case(**sizes)
    model, inputs = reference.random_model(case), reference.random_inputs(case)
    inputs["t"] = np.linspace(0.4375, 1, len(case.times), dtype=np.float32)
    expected = reference.run(model, case, inputs)
    params = from_reference(reference.weights(model), case.depth)
    net = mmdit(our_config(dataclasses.asdict(case), dtype="bfloat16"))
    ours = relative_error(
        jax.jit(net)(params, inputs["x"], inputs["t"], inputs["text"], inputs["text_mask"]),
        expected)
    theirs = relative_error(reference.run(model.bfloat16(), case, inputs), expected)
    print(f"ours {ours:.2e}, PyTorch {theirs:.2e}")
    assert 1e-4 < ours < 1.2 * theirs


@pytest.mark.parametrize("change", [
    dict(rope_axes="swap"), dict(rope_theta=9_000.0),
], ids=["axes_swapped", "theta"])
def test_small_differences_would_show(change):
    """The tolerance is tight enough to see rows and columns exchanged, or another RoPE base."""
    with safe_open(FIXTURES / "qwen_image_clip_tall.safetensors", "np") as file:
        case = json.loads(file.metadata()["about"])["case"]
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    config = our_config(case)
    if change.get("rope_axes") == "swap":
        f, h, w = config.rope_axes
        change = {"rope_axes": (f, w, h)}
    net = mmdit(dataclasses.replace(config, **change))
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    inputs = [tensors[f"inputs.{k}"] for k in ("x", "t", "text", "text_mask")]
    v = jax.jit(net)(from_reference(weights, case["depth"]), *inputs)
    assert relative_error(v, tensors["output"]) > 10 * TOLERANCE
