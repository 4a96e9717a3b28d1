"""Wan equals diffusers' WanTransformer3DModel: from files and, with torch, live."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from live import FIXTURES, live_reference
from networks import relative_error
from safetensors import safe_open
from wan_names import from_reference

from apt_jax.models.wan import Wan, WanConfig
from apt_jax.nn.functional import Network

FILES = sorted(FIXTURES.glob("wan_*.safetensors"))
TOLERANCE = 2e-5  # the promise is 1e-4


def our_config(case: dict, **changes) -> WanConfig:
    width = case["heads"] * case["head_dim"]
    fields = dict(
        in_channels=case["channels"][0], out_channels=case["channels"][1],
        patch=tuple(case["patch"]), width=width, depth=case["depth"], heads=case["heads"],
        head_dim=case["head_dim"], text_width=case["text_width"],
        text_tokens=case["text_tokens"], frequency_width=case["frequencies"],
        mlp_ratio=case["ffn"] / width)
    return WanConfig(**fields | changes)


def velocity(config: WanConfig, params, inputs) -> np.ndarray:
    """The velocity; the tree is checked to be exactly ours, and float32."""
    net = Network.build(lambda rngs: Wan(config, rngs=rngs))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, net.abstract())
    v = jax.jit(net)(params, *(inputs[k] for k in ("x", "t", "text", "text_mask")))
    assert v.dtype == np.float32
    return np.asarray(v)


def read(path):
    with safe_open(path, "np") as file:
        case = json.loads(file.metadata()["about"])["case"]
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    groups = {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("weights.", "inputs.")
    }
    params = from_reference(groups["weights."], case["depth"], tuple(case["patch"]))
    return case, params, groups["inputs."], tensors["output"]


@pytest.fixture(scope="module", params=FILES, ids=lambda p: p.stem.removeprefix("wan_"))
def fixture(request):
    return read(request.param)


def test_there_are_fixtures():
    assert len(FILES) >= 3
    assert all(f.stat().st_size < 1_500_000 for f in FILES)


def test_equals_the_reference(fixture):
    case, params, inputs, expected = fixture
    v = velocity(our_config(case), params, inputs)
    assert v.shape == expected.shape and np.linalg.norm(expected) > 1
    error = relative_error(v, expected)
    print(f"relative error {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("change", [
    dict(rope_theta=5_000.0), dict(text_tokens=0), dict(text_tokens=17),
], ids=["theta", "text_not_filled_up", "text_one_too_long"])
def test_small_differences_would_show(change):
    """Another RoPE base, or the zeros behind the text left out or one too many (they are attended
    to), would be seen."""
    case, params, inputs, expected = read(FIXTURES / "wan_image_tall.safetensors")
    v = velocity(our_config(case, **change), params, inputs)
    assert relative_error(v, expected) > 10 * TOLERANCE


def test_a_missing_or_unknown_reference_name_is_an_error():
    with safe_open(FILES[0], "np") as file:
        case = json.loads(file.metadata()["about"])["case"]
        names = [k for k in file.keys() if k.startswith("weights.")]  # noqa: SIM118
        weights = {k.removeprefix("weights."): file.get_tensor(k) for k in names}
    arguments = case["depth"], tuple(case["patch"])
    with pytest.raises(KeyError):
        from_reference({k: v for k, v in weights.items() if k != "blocks.0.norm2.bias"}, *arguments)
    with pytest.raises(ValueError, match="surplus"):
        from_reference(weights | {"surplus": np.zeros(1)}, *arguments)


LIVE = {
    "image": dict(seed=11, heads=4, head_dim=32, depth=4, ffn=300, text_width=64,
                  size=(1, 18, 10), channels=(16, 16), text_lengths=(9, 20, 1),
                  times=(0.0, 0.42, 1.0), text_tokens=64),
    "clip": dict(seed=12, heads=2, head_dim=128, depth=3, ffn=500, text_width=48,
                 size=(5, 6, 14), channels=(16, 16), text_lengths=(33, 7), times=(0.09, 0.93),
                 text_tokens=512),
}


@pytest.mark.parametrize("name", LIVE)
def test_equals_the_live_reference(name, tmp_path):
    """float32 to 1e-4; bfloat16 no further from float32 than PyTorch's own bfloat16 (times 1.2),
    which keeps time embedding, norms and modulation in float32 when loaded as users load it."""
    reference = live_reference("wan_reference")
    import torch

    case = reference.Case(**LIVE[name])
    fields = dataclasses.asdict(case)
    model, inputs = reference.random_model(case), reference.random_inputs(case)
    expected = reference.run(model, case, inputs)
    params = from_reference(reference.weights(model), case.depth)
    error = relative_error(velocity(our_config(fields), params, inputs), expected)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    theirs = relative_error(reference.run(half, case, inputs), expected)
    ours = relative_error(
        velocity(our_config(fields, dtype="bfloat16"), params, inputs), expected)
    print(f"float32 {error:.2e}; bfloat16 ours {ours:.2e}, PyTorch {theirs:.2e}")
    assert error < TOLERANCE and 1e-4 < ours < 1.2 * theirs
