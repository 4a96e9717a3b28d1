"""The PyTorch file beside an export with shared modulation, against our network."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import synthetic

from apt_jax.convert.exporting import export_folder
from apt_jax.models.presets import make_generator
from apt_jax.weights import save_generator

torch = pytest.importorskip("torch")

MODEL = {**synthetic.QWEN, "modulation": "shared", "in_channels": 3, "out_channels": 2, "depth": 3,
         "patch": (2, 2, 2), "heads": 3, "head_dim": 8, "rope_axes": (4, 2, 2), "mlp_ratio": 1.4}

RUN = """
import sys
import torch
from mmdit_shared import MMDiTShared, one_step
from safetensors.torch import load_file, save_file
assert "apt_jax" not in sys.modules and "jax" not in sys.modules
model = MMDiTShared.from_pretrained(".")
x = load_file("inputs.safetensors")
with torch.no_grad():
    v = model(x["x"], x["t"], x["text"], x["mask"].bool())
save_file({"v": v.contiguous(), "bf16": MMDiTShared.from_pretrained(".", torch.bfloat16)(
    x["x"], x["t"], x["text"], x["mask"].bool()).detach().contiguous()}, "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        scale = 1 / np.sqrt(leaf.shape[-2]) if name == "kernel" else 0.3
        return (scale * rng.normal(size=leaf.shape) + (name == "scale")).astype(np.float32)

    net = make_generator(MODEL)
    params = jax.tree_util.tree_map_with_path(draw, net.abstract())
    weights = save_generator(folder / "weights", MODEL, params)
    out = export_folder(str(weights), folder / "out", shard_bytes=30_000)
    return net, params, out


def test_it_equals_ours_without_this_package(exported):
    """In a process of its own, from the exported folder alone, on a clip with padded text."""
    from safetensors.numpy import load_file, save_file

    net, params, out = exported
    assert len(list(out.glob("*.safetensors"))) > 1
    card = (out / "README.md").read_text()
    assert "in `mmdit_shared.py`" in card and "library_name: pytorch" in card
    rng = np.random.default_rng(1)
    mask = np.arange(7) < np.array([[7], [3]])
    x = {"x": rng.normal(size=(2, 4, 6, 10, 3)).astype(np.float32),
         "t": np.array([1.0, 0.37], np.float32),
         "text": rng.normal(size=(2, 7, MODEL["text_width"])).astype(np.float32)}
    save_file({**x, "mask": mask.astype(np.uint8)}, out / "inputs.safetensors.tmp")
    (out / "inputs.safetensors.tmp").rename(out.parent / "inputs.safetensors")
    code = RUN.replace('"inputs', '"../inputs').replace('"outputs', '"../outputs')
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(out)})
    assert done.returncode == 0, done.stderr
    found = load_file(out.parent / "outputs.safetensors")
    want = np.asarray(jax.jit(net)(params, x["x"], x["t"], x["text"], mask))
    assert found["v"].shape == want.shape == (2, 4, 6, 10, 2)

    def error(a):
        return np.linalg.norm(a - want) / np.linalg.norm(want)

    assert error(found["v"]) < 1e-5
    assert 1e-4 < error(found["bf16"]) < 0.05


def test_the_8b_preset_fits_its_class(exported):
    """Every name and shape of the preset: the module built on the meta device."""
    import importlib.util

    from apt_jax.config import load_config
    from apt_jax.convert.families import transformer_plan
    from apt_jax.convert.tables import qwen_image

    model = load_config("configs/seaweed_8b_image.py").model
    spec = importlib.util.spec_from_file_location("mmdit_shared", exported[2] / "mmdit_shared.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads(json.dumps(qwen_image.config_from(model)))
    assert config.pop("_class_name") == "MMDiTShared"
    with torch.device("meta"):
        network = module.MMDiTShared(**config)
    plan = transformer_plan(model)
    plan.check({k: tuple(v.shape) for k, v in network.state_dict().items()}, "8B")
    assert sum(p.numel() for p in network.parameters()) == make_generator(model).parameter_count()
