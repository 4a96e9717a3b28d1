"""Compiles for H100 and TPUs that are not there (make test-plan). Each command has its own process:
the compilers read their flags once, and tests/conftest.py sets flags for another purpose."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESH = ["--config.mesh.replica=1", "--config.mesh.fsdp=1"]
VIDEO_8B = ["--config", "configs/seaweed_8b_video.py"]

pytestmark = pytest.mark.plan


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) for name in modules)


needs_cuda = pytest.mark.skipif(not (has("jax_cuda12_plugin") or has("jax_cuda13_plugin")),
                                reason="needs jax's CUDA plugin")
needs_tpu = pytest.mark.skipif(not has("libtpu"), reason="needs libtpu")


def bench(tmp_path, *arguments: str) -> dict[str, dict]:
    """Runs `apt-jax bench ... --device-less`, which must succeed; its rows."""
    out = tmp_path / "rows.json"
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "apt_jax", "bench", *arguments, "--device-less", "--json", str(out)],
        cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert rows and all(row["passes"] and row["kernels"] == row["wanted"] for row in rows.values())
    return rows


def gpu_backends() -> list[str]:
    return ["pallas", "hopper", "cudnn"] + (["tokamax"] if has("tokamax") else [])


@needs_cuda
def test_attention_compiles_for_h100_by_every_gpu_kernel(tmp_path):
    rows = bench(tmp_path, "attention", "--topology", "h100:1x1", "--backends", *gpu_backends(),
                 "cudnn_fp8")
    assert len(rows) == 8 * 2 * len(gpu_backends()) + 8  # eight bits have no gradient
    ours = rows["8b_720p_joint/gradient/pallas"]
    assert ours["kernels"] == {"apt_flash_forward": 1, "apt_flash_dkv": 1, "apt_flash_dq": 1}
    # q, k, v are read as they lie: no copy of them, only delta and one gradient beside the results
    assert ours["temporary_bytes"] < 300 * 2**20
    eight = rows["8b_720p_joint/forward/cudnn_fp8"]
    assert eight["kernels"] == {'"__cudnn$fmhaSoftmaxF8"': 1}
    # q, k and v are written once, in eight bits, and the result once: no copy in between
    assert eight["written_bytes"] < 1.1 * (3 * 1 + 2) * 47_104 * 24 * 128


PTXAS = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from apt_jax.kernels.hopper.attention import hopper
from apt_jax.plan.chips import parse_topology
from apt_jax.plan.devices import describe
there = SingleDeviceSharding(describe(parse_topology("h100:1x1"))[0])
for dim in (64, 128):
    x = jax.ShapeDtypeStruct((1, 47_104, 24, dim), jnp.bfloat16, sharding=there)
    mask = jax.ShapeDtypeStruct((1, 47_104), jnp.bool_, sharding=there)
    for masks in ((), (mask,)):
        def loss(q, k, v, *mask):
            return hopper(q, k, v, *(mask or (None,)), hidden_last=True).astype(jnp.float32).sum()
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, *masks).compile()
"""


@needs_cuda
def test_our_hopper_kernels_neither_spill_nor_wait_between_products():
    """ptxas says where it had to put one product after the other, and what does not fit registers."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", PTXAS], cwd=ROOT, capture_output=True, text=True,
                          env=env | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"})
    said = done.stdout + done.stderr
    stores = [int(n) for n in re.findall(r"bytes stack frame, (\d+) bytes spill stores", said)]
    assert len(stores) == 4 * 3, said[-2000:]
    assert max(stores) <= 8, said  # of 240 registers, dk and dv at 128 channels
    assert "serialized" not in said


@needs_cuda
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_8b_one_step_forward_runs_each_kernel_36_times(tmp_path, gpus):
    rows = bench(tmp_path, "forward", *VIDEO_8B, "--topology", f"h100:1x{gpus}", *MESH,
                 f"--config.mesh.context={gpus}", "--backends", *gpu_backends(), "cudnn_fp8")
    assert len(rows) == len(gpu_backends()) + 1
    for row in rows.values():
        assert max(row["kernels"].values()) == 36
        assert row["largest"] < 46_800**2


@needs_cuda
@pytest.mark.parametrize("config, overrides", [
    ("demo_image", []),
    ("seaweed_8b_image", ["--config.model.depth=2", "--config.discriminator.taps=1,2"])])
def test_an_image_has_fewer_scores_than_weights_and_passes(tmp_path, config, overrides):
    (row,) = bench(tmp_path, "forward", "--config", f"configs/{config}.py", "--topology",
                   "h100:1x1", *MESH, "--config.mesh.context=1", *overrides, "--backends",
                   "pallas").values()
    assert row["kernels"]["apt_flash_forward"] == (2 if overrides else 4)
    assert row["tables"] == []


@needs_cuda
def test_plain_attention_for_h100_leaves_a_table_of_scores(tmp_path):
    """What the check is for: without a kernel the compiler writes the scores."""
    case = "AttentionCase('t', 4300, 4352, 2, 64, hidden=3)"
    code = ("from apt_jax.plan.devices import prepare_environment, describe; prepare_environment()\n"
            "from apt_jax.bench.cases import AttentionCase\n"
            "from apt_jax.bench.device_less import compile_attention\n"
            "from apt_jax.plan.chips import parse_topology\n"
            "device = describe(parse_topology('h100:1x1'))[0]\n"
            "for part in ('forward', 'gradient'):\n"
            f"    print(compile_attention({case}, 'oracle', part, device).error)\n")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    said = [line for line in done.stdout.splitlines() if "is a table of scores" in line]
    assert len(said) == 2, done.stdout + done.stderr[-2000:]


# One line for each network: the instructions in the loop of its layers.
IN_THE_LOOP = """
from apt_jax.plan.devices import prepare_environment, describe, elsewhere; prepare_environment()
import sys, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from apt_jax.models.presets import make_generator
from apt_jax.plan.chips import parse_topology
from apt_jax.plan.hlo import parse_hlo
device = describe(parse_topology("h100:1x1"))[0]
array = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=SingleDeviceSharding(device))
sizes = dict(in_channels=16, out_channels=16, patch=(1, 2, 2), width=256, depth=3, heads=2,
             head_dim=128, text_width=64, mlp_ratio=4.0, dtype="bfloat16", remat="none",
             rope_theta=1e4)
own = {"mmdit": dict(rope_axes=(16, 56, 56), modulation="shared"),
       "wan": dict(text_tokens=0, frequency_width=64)}
# Of eight samples: cuBLAS wants tokens in multiples of 8, and would have XLA pad for it.
inputs = [array((8, 3, 50, 54, 16), jnp.float32), array((8,), jnp.float32),
          array((8, 125, 64), jnp.float32), array((8, 125), jnp.bool_)]
for family, fields in own.items():
    for attention in sys.argv[1:]:
        net = make_generator(sizes | fields | {"family": family, "attention": attention})
        params = jax.tree.map(lambda a: array(a.shape, jnp.bfloat16), net.abstract())
        with elsewhere(device):
            program = parse_hlo(jax.jit(net).lower(params, *inputs).compile().as_text())
        inside = [i for name, times in program.walk() if times == 3
                  for i in program.computations[name]]
        calls = [i.name + i.rest for i in inside if i.opcode.startswith("custom-call")]
        print("FOUND", family, attention, *sorted({i.opcode for i in inside}), *(
            name for name in ("apt_hopper_forward", "mosaic_gpu", "__cudnn$fmhaSoftmax")
            if name in str(calls)))
"""


@needs_cuda
def test_no_layer_pads_or_moves_tokens_for_its_kernel():
    """2,025 video and 125 text tokens are whole tiles of neither tokamax, our Hopper kernel nor (Wan's)
    cuDNN, and text has a mask: the loop over layers has their kernels and neither a pad nor a gather."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", IN_THE_LOOP, *gpu_backends()[1:]], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 2 * len(gpu_backends()[1:]), done.stdout + done.stderr[-2000:]
    for family, attention, *inside in found:
        assert {"cudnn": "__cudnn$fmhaSoftmax", "tokamax": "mosaic_gpu",
                "hopper": "apt_hopper_forward"}[attention] in inside
        assert not {"pad", "gather", "scatter"} & set(inside), (family, attention)


@needs_cuda
def test_ulysses_in_a_ring_runs_our_kernel_in_every_turn(tmp_path):
    (row,) = bench(tmp_path, "forward", *VIDEO_8B, "--topology", "h100:1x8", *MESH,
                   "--config.mesh.context=8", "--config.mesh.ulysses=2", "--backends",
                   "pallas").values()
    assert row["kernels"]["apt_flash_forward"] == 4 * 36


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("remat, forwards", [("full", (108, 144)), ("attention", (72, 72))])
def test_the_8b_train_steps_run_the_kernels_they_should(tmp_path, remat, forwards):
    rows = bench(tmp_path, "train", *VIDEO_8B, "--topology", "h100:1x8", "--config.mesh.replica=1",
                 "--config.mesh.fsdp=2", "--config.mesh.context=4", f"--config.model.remat={remat}",
                 "--backends", *(gpu_backends() if remat == "full" else ["pallas", "cudnn"]))
    steps = {row["part"]: row["kernels"] for row in rows.values() if row["backend"] == "pallas"}
    assert [steps[name]["apt_flash_forward"] for name in ("D step", "G step")] == list(forwards)
    assert [steps[name]["apt_flash_dkv"] for name in ("D step", "G step")] == [36, 72]


FP8 = "__cublas$lt$matmul$f8"
WAN = ["--config", "configs/wan_1_3b_apt_video.py", "--config.data.height=60",
       "--config.data.width=104", "--config.model.depth=1", "--config.discriminator.taps=1,"]
ONE_GPU = ["--topology", "h100:1x1", *MESH, "--config.mesh.context=1"]


@needs_cuda
def test_eight_bit_weights_are_multiplied_as_such_and_not_copied(tmp_path):
    """Eight products a layer; XLA would turn weights around that did not lie as cuBLASLt reads them,
    and all layers' at once (7.6 GiB)."""
    rows = bench(tmp_path, "forward", *VIDEO_8B, *ONE_GPU, "--weights", "fp8", "bfloat16",
                 "--backends", "pallas")
    eight, half = rows.values()
    assert eight["kernels"][FP8] == 8 * 36 and half["kernels"][FP8] == 0
    assert eight["temporary_bytes"] < half["temporary_bytes"] + 1.5 * 2**30


@needs_cuda
@pytest.mark.parametrize("gpus, kept", [(1, 0), (1, 1), (8, 0)])
def test_everything_in_eight_bits_is_cudnns_attention_and_cublass_products(tmp_path, gpus, kept):
    (row,) = bench(tmp_path, "forward", *VIDEO_8B, "--topology", f"h100:1x{gpus}", *MESH,
                   f"--config.mesh.context={gpus}", f"--config.model.matmul_kept={kept}",
                   "--weights", "fp8", "--backends", "cudnn_fp8").values()
    assert row["kernels"] == {'"__cudnn$fmhaSoftmaxF8"': 36, FP8: 8 * (36 - kept)}


@needs_cuda
def test_a_block_takes_one_kernel_of_any_name(tmp_path):
    rows = bench(tmp_path, "block", *VIDEO_8B, *ONE_GPU, "--backends", "cudnn_fp8",
                 *gpu_backends()[1:])
    assert [list(row["kernels"].values())[0] for row in rows.values()] == (
        [1, 1, 1] + [1, 3] * has("tokamax"))


@needs_cuda
def test_a_block_is_one_kernel_and_its_products(tmp_path):
    rows = bench(tmp_path, "block", *VIDEO_8B, *ONE_GPU, "--weights", "bfloat16", "fp8",
                 "--backends", "pallas")
    assert [row["kernels"][FP8] for row in rows.values()] == [0, 0, 8, 24]
    assert [row["kernels"]["apt_flash_dkv"] for row in rows.values()] == [0, 1, 0, 1]


@needs_cuda
def test_wans_keys_and_values_of_the_text_are_one_product(tmp_path):
    """Ten matrices, of which XLA merges the two small ones that share the text."""
    (row,) = bench(tmp_path, "forward", *WAN, *ONE_GPU, "--weights", "fp8", "--backends",
                   "cudnn").values()
    assert row["kernels"][FP8] == 9 and row["kernels"]['"__cudnn$fmhaSoftmax"'] == 2


@needs_cuda
def test_cudnn_trains_wans_discriminator(tmp_path):
    """Real, perturbed and fake samples share a text, whose keys vmap leaves unbatched."""
    (row,) = bench(tmp_path, "train", *WAN, *ONE_GPU, "--steps", "D step", "--backends",
                   "cudnn").values()
    assert row["kernels"]['"__cudnn$fmhaSoftmaxBackward"'] == 2


@needs_cuda
@pytest.mark.slow
def test_a_kernel_whose_result_is_kept_for_the_gradient_runs_once(tmp_path):
    """jax 0.11's XLA ran Mosaic kernels twice in a scan, once to write the result where the gradient
    finds it; under vmap (D sees three kinds of samples) ours lost their names."""
    backends = [name for name in gpu_backends() if name not in ("pallas", "cudnn")]
    rows = bench(tmp_path, "train", *VIDEO_8B, *ONE_GPU, "--config.model.depth=3",
                 "--config.discriminator.taps=2,3", "--steps", "D step", "--backends", *backends)
    (row,) = (row for row in rows.values() if row["backend"] == "hopper")
    assert row["kernels"] == {"apt_hopper_forward": 6, "apt_hopper_dkv": 3, "apt_hopper_dq": 3, FP8: 0}


@needs_cuda
@pytest.mark.slow
def test_training_multiplies_in_eight_bits(tmp_path):
    rows = bench(tmp_path, "train", *VIDEO_8B, *ONE_GPU, "--config.model.depth=2",
                 "--config.discriminator.taps=1,2", "--weights", "fp8", "--backends", "pallas")
    d, g = rows.values()
    assert d["kernels"][FP8] >= 8 * (2 + 3 * 2) and g["kernels"][FP8] >= 8 * (3 * 2 + 2 * 2)


@needs_cuda
@pytest.mark.slow
def test_the_pipelines_stages_compile(tmp_path):
    rows = bench(tmp_path, "pipeline", *VIDEO_8B, *ONE_GPU, "--weights", "fp8", "--decoders",
                 "chunk 1", "--backends", "pallas")
    encode, draw, decode = rows.values()
    assert draw["kernels"]["apt_flash_forward"] == 36
    assert decode["temporary_bytes"] < 20 * 2**30 and encode["temporary_bytes"] < 2**30


TPUS = pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])


@needs_tpu
@TPUS
def test_splash_attention_compiles_for_tpus(tmp_path, topology):
    rows = bench(tmp_path, "attention", "--topology", topology, "--cases", "8b_720p_joint",
                 "wan_480p_cross", "prime_head_64", "one_query")
    assert {row["backend"] for row in rows.values()} == {"splash"} and len(rows) == 8


@needs_tpu
@TPUS
@pytest.mark.parametrize("what, counts", [
    # (forward, backward) runs of splash: two layers; D's three samples go through it at once
    ("block", [(1, 0), (1, 1)]), ("forward", [(2, 0)]),
    pytest.param("train", [(4, 2), (4, 4)], marks=pytest.mark.slow)])
def test_splash_attention_is_in_the_programs_for_tpus(tmp_path, topology, what, counts):
    """Two narrow layers of the 8B preset, a clip of 720p (in training, which takes long to compile,
    an image) cut over the four chips."""
    # 1,280 + 256 tokens: what splash takes without padding
    image = ["--config.data.frames=1,", "--config.data.height=64", "--config.data.width=80"]
    rows = bench(tmp_path, what, *VIDEO_8B, *MESH, *(image if what == "train" else []),
                 "--config.mesh.context=4", "--topology",
                 topology, "--config.model.depth=2", "--config.model.width=512", "--config.model.heads=4",
                 "--config.model.text_width=512", "--config.discriminator.taps=1,2",
                 "--config.discriminator.heads=4")
    assert [(row["kernels"]["splash_mha_fwd"], row["kernels"]["splash_mha_dq"])
            for row in rows.values()] == counts
    assert all(row["selected"] == ["splash"] for row in rows.values())


DECODER = """
from apt_jax.plan.devices import describe, prepare_environment; prepare_environment()
import sys
from apt_jax.bench.case import compile_case
from apt_jax.bench.pipeline import decode_case
from apt_jax.config import load_config
from apt_jax.models.vae import VAEConfig
from apt_jax.plan.chips import parse_topology
config = load_config("configs/seaweed_8b_video.py", [
    "--config.data.frames=2,", "--config.data.height=32", "--config.data.width=32"])
vae = VAEConfig(base=32, multipliers=(1, 2), blocks=1, temporal=(True,), dtype="bfloat16")
device = describe(parse_topology(sys.argv[1]))[0]
row = compile_case(decode_case(config, device, "chunk 1", vae), device, "test")
print("FOUND", row.kernels["splash_mha_fwd"], *row.selected, row.passes)
"""


@needs_tpu
@TPUS
def test_splash_attention_is_in_the_vaes_programs_for_tpus(topology):
    """A small decoder, 2 latents of 32x32, one at a time."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", DECODER, topology], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert found == ["FOUND 2 splash True"], done.stdout + done.stderr[-2000:]
