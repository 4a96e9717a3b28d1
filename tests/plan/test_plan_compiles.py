"""The plan command against the real compilers for H100 and v5p (make test-plan)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.plan

NARROW = ["--config", "configs/seaweed_8b_video.py", "--config.model.depth=6",
          "--config.discriminator.taps=3,6", "--config.data.frames=1,",
          "--config.data.height=64", "--config.data.width=64", "--config.train.batch_size=16"]
SMALL = ["--config", "configs/seaweed_8b_video.py", "--no-inference", "--config.model.depth=8",
         "--config.discriminator.taps=8,", "--config.model.width=1024", "--config.model.heads=8",
         "--config.discriminator.heads=8", "--config.train.batch_size=2"]


def has(name):
    return importlib.util.find_spec(name) is not None


def python(*arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True,
                          text=True)


def plan(tmp_path, topology, *arguments):
    out = tmp_path / "plan.json"
    done = python("-m", "apt_jax", "plan", "--topology", topology, "--json", str(out), *arguments)
    return done, json.loads(out.read_text()) if out.is_file() else None


@pytest.mark.skipif(not has("jax_cuda12_plugin"), reason="needs jax's CUDA plugin")
def test_h100s_gather_a_layer_in_bfloat16_and_scatter_its_gradient(tmp_path):
    done, value = plan(tmp_path, "h100:1x8", *NARROW)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert value["fits"] and value["mesh"] == {"replica": 1, "fsdp": 2, "context": 4, "tensor": 1}
    for name in ("G step", "D step"):
        traffic = value["programs"][name]["collectives"]
        moved = {}
        for row in traffic:
            key = row["kind"], row["dtype"]
            moved[key] = moved.get(key, 0) + row["wire"]
        assert moved["all-gather", "bf16"] > 20 * moved.get(("all-gather", "f32"), 0)
        assert moved["reduce-scatter", "bf16"] > 20 * moved.get(("all-reduce", "f32"), 0)
        assert not [n for n in value["programs"][name]["notes"] if "float32" in n]
    assert "fits:" in done.stdout


@pytest.mark.skipif(not has("jax_cuda12_plugin"), reason="needs jax's CUDA plugin")
def test_copies_add_up_and_no_gradient_is_summed_over_what_cuts_it(tmp_path):
    """Four copies: their sum goes over replica alone, and over fsdp and context every matrix's
    gradient, of D's heads too, leaves by a reduce-scatter."""
    done, value = plan(tmp_path, "h100:4x8", *NARROW, "--no-inference", "--config.mesh.replica=4",
                       "--config.mesh.fsdp=2", "--config.train.batch_size=32")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("G step", "D step"):
        program = value["programs"][name]
        assert not [note for note in program["notes"] if note.startswith("all-reduce over")]
        sums = {row["axes"]: row["wire"] for row in program["collectives"]
                if row["kind"] == "all-reduce" and row["dtype"] == "bf16"}
        scattered = sum(row["wire"] for row in program["collectives"]
                        if row["kind"] == "reduce-scatter" and row["dtype"] == "bf16")
        assert scattered > sums["replica"] > 20 * sum(
            wire for axes, wire in sums.items() if axes != "replica")


@pytest.mark.skipif(not has("jax_cuda12_plugin"), reason="needs jax's CUDA plugin")
def test_the_consistency_step_evaluates_three_networks(tmp_path):
    done, value = plan(tmp_path, "h100:1x8", *NARROW, "--config.stage=consistency")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    step, drawn = value["programs"]["G step"], value["programs"]["one-step inference"]
    # a guided teacher (two evaluations), the target and the student
    assert step["flops_forward_tflop"] == pytest.approx(4 * drawn["flops_forward_tflop"], rel=0.01)
    assert not [n for n in step["notes"] if n.startswith(("float32", "all-reduce over"))]
    # remat attention sends the student's four arrays of a layer again: 6 times four where 5 would do
    assert step["context_gib"] == pytest.approx(6 / 5 * step["context_minimum_gib"], rel=0.01)


@pytest.mark.skipif(not has("jax_cuda12_plugin"), reason="needs jax's CUDA plugin")
def test_what_does_not_fit_comes_with_a_remedy_and_status_1(tmp_path):
    # one clip of 46,800 tokens on one GPU, with nothing recomputed, in a narrow network
    done, value = plan(tmp_path, "h100:1x1", *SMALL, "--config.mesh.context=1",
                       "--config.model.remat=none")
    assert done.returncode == 1 and not value["fits"]
    assert value["remedy"] == "--config.model.remat=full" and "it would fit with" in done.stdout


# One program, the step of pre-training, of a narrow network.
NARROWER = ["--config", "configs/seaweed_8b_video.py", "--config.stage=pretrain", "--no-inference",
            "--config.model.depth=2", "--config.model.width=256", "--config.model.heads=4",
            "--config.model.head_dim=64", "--config.model.rope_axes=16,24,24",
            "--config.discriminator.taps=2,", "--config.discriminator.heads=4"]


@pytest.mark.skipif(not (has("jax_cuda12_plugin") and has("tokamax")),
                    reason="needs jax's CUDA plugin and tokamax")
def test_a_kernel_that_was_asked_for_is_the_one_that_is_compiled(tmp_path):
    done, value = plan(tmp_path, "h100:1x1", *NARROWER, "--config.mesh.context=1",
                       "--config.data.frames=1,", "--config.data.height=64", "--config.data.width=64",
                       "--config.train.batch_size=2", "--config.model.attention=tokamax",
                       "--hlo", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert value["attention"] == "tokamax" and "attention: tokamax" in done.stdout
    assert "mosaic_gpu" in (tmp_path / "G_step.txt").read_text()
    assert value["flags"]["xla_gpu_memory_limit_slop_factor"] == 105


@pytest.mark.skipif(not has("jax_cuda12_plugin"), reason="needs jax's CUDA plugin")
def test_the_best_of_a_sweep_is_what_it_is_alone(tmp_path):
    """One clip of 46,800 tokens on two GPUs, over context or over tensor: two meshes and two remats, of
    which what keeps everything does not fit."""
    clip = [*NARROWER, "--config.train.batch_size=1", "--config.model.depth=120"]
    done, rows = plan(tmp_path, "h100:1x2", *clip, "--sweep", "--remats", "none", "full")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted((row["label"], row["remat"]) for row in rows) == [
        (f"{axis} 2", remat) for axis in ("context", "tensor") for remat in ("full", "none")]
    for row in rows:
        assert row["fits"] == (row["peak_gib"] <= row["usable_gib"])
        assert row["attention"] == "pallas" and row["flags"]
    fits = [row for row in rows if row["fits"]]
    assert 0 < len(fits) < 4 and rows[:len(fits)] == fits
    assert len({row["step_seconds"] for row in fits}) > 1
    times = [row["step_seconds"] / row["batch"] for row in fits]
    assert times == sorted(times)
    best = rows[0]
    done, alone = plan(tmp_path, "h100:1x2", *clip, f"--config.model.remat={best['remat']}",
                       *(f"--config.mesh.{axis}={size}" for axis, size in best["mesh"].items()))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert alone["peak_gib"] == best["peak_gib"] and alone["step_seconds"] == best["step_seconds"]


@pytest.mark.skipif(not has("libtpu"), reason="needs libtpu")
def test_tpus_too(tmp_path):
    done, value = plan(tmp_path, "v5p:2x2x2", *NARROW)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    program = value["programs"]["D step"]
    rows = {(row["kind"], row["axes"], row["dtype"]): row for row in program["collectives"]}
    assert "all-to-all" in {kind for kind, _, _ in rows}
    # On the sparse cores, where the flags put them (apt_jax/parallel/flags/tpu.txt): libtpu would sum
    # gradients whole over all devices of a slice, and wait for every gather.
    layers = rows["reduce-scatter", "fsdp+context", "bf16"]
    assert layers["count"] >= program["microbatches"]
    assert rows["all-gather", "fsdp+context", "bf16"]["overlapped"] > 0.0
    assert not [note for note in program["notes"] if "where a reduce-scatter would do" in note]


SPLIT = """
from apt_jax.plan.devices import describe, prepare_environment
prepare_environment()
from apt_jax.parallel.mesh import make_mesh
from apt_jax.plan.chips import parse_topology
devices = describe(parse_topology("v6e:16x16"))
mesh = make_mesh({"replica": -1, "fsdp": -1, "context": 4}, devices)
print(*mesh.shape.values(), len({d.id for d in mesh.devices.flat}))
near = [d.coords for d in mesh.devices[0, 0, :, 0]]
print(max(sum(abs(a - b) for a, b in zip(x, y)) for x, y in zip(near, near[1:])))
"""


@pytest.mark.skipif(not has("libtpu"), reason="needs libtpu")
def test_a_mesh_may_cut_the_sides_of_a_slice():
    """2 x 32 x 4 of 16 x 16, which jax.make_mesh refuses; the clip's four devices stay neighbours."""
    done = subprocess.run([sys.executable, "-c", SPLIT], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "32", "4", "1", "256", "1"], done.stderr[-2000:]


V4 = """
from apt_jax.plan.devices import describe, prepare_environment
prepare_environment()
import re, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from apt_jax.parallel.flags import compiler_options
from apt_jax.parallel.mesh import make_mesh
from apt_jax.plan.chips import GIB, parse_topology
from apt_jax.plan.compiler import compile_text
topology = parse_topology("v4:2x2x1")
devices, options = describe(topology), compiler_options("auto", "tpu")
mesh = make_mesh({"fsdp": 4, "replica": 1}, devices)
print(len(devices), len({tuple(d.coords) for d in devices}), mesh.shape["fsdp"])
cut = NamedSharding(mesh, PartitionSpec("fsdp"))
x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=cut)
compiled, text = compile_text(jax.jit(lambda w, x: x @ w).lower(x, x), options, "tpu")
print(compiled.memory_analysis().argument_size_in_bytes // 2**20, "all-gather" in text)
x = jax.ShapeDtypeStruct((2**17, 2**17), jnp.bfloat16, sharding=SingleDeviceSharding(devices[0]))
try:
    compile_text(jax.jit(lambda x: (x @ x) @ (x.T @ x)).lower(x), options, "tpu")
except jax.errors.JaxRuntimeError as error:
    room = float(re.search(r"available HBM \\(([\\d.]+)G", str(error)).group(1)) * GIB
    print(0.94 * topology.chip.memory <= room <= topology.chip.memory)
"""


@pytest.mark.skipif(not has("libtpu"), reason="needs libtpu")
def test_a_device_of_a_v4_is_a_chip():
    """Its two cores and all of its memory; the flags for TPUs are taken."""
    done = python("-c", V4)
    assert done.stdout.split() == ["4", "4", "4", "16", "True", "True"], done.stderr[-2000:]


SLICES = """
from apt_jax.plan.devices import prepare_environment
prepare_environment()
from jax.experimental import topologies
from apt_jax.parallel.mesh import make_mesh
devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5p:2x2x4", num_slices=4).devices
for sizes in ({"replica": 4, "fsdp": -1, "context": 4}, {"replica": 2, "fsdp": -1, "context": 4}):
    mesh = make_mesh(sizes, list(devices))
    clips = [{d.slice_index for d in clip.flat} for row in mesh.devices for clip in row]
    copies = [{d.slice_index for d in copy.flat} for copy in mesh.devices]
    print(len({d.id for d in mesh.devices.flat}), max(map(len, clips)), max(map(len, copies)))
"""


@pytest.mark.skipif(not has("libtpu"), reason="needs libtpu")
def test_tpu_slices_are_copies_and_no_clip_crosses_the_network():
    done = subprocess.run([sys.executable, "-c", SLICES], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["64", "1", "1", "64", "1", "2"], done.stderr[-2000:]


@pytest.mark.skipif(not has("libtpu"), reason="needs libtpu")
def test_what_the_tpu_compiler_finds_no_room_for_does_not_fit(tmp_path):
    """Nothing recomputed on 16 GiB a chip: XLA:TPU ends in an error, the plan in a verdict."""
    done, value = plan(tmp_path, "v5e:2x2", *SMALL, "--no-remedy", "--config.mesh.context=4",
                       "--config.model.remat=none")
    assert done.returncode == 1 and not value["fits"], done.stderr[-2000:]
    refused = value["programs"]["D step"]["refused"]
    assert "hbm" in refused.lower() and refused in done.stdout and "Traceback" not in done.stderr
    assert value["programs"]["D step"]["peak_gib"] > 15


def test_an_unknown_slice_is_one_line(tmp_path):
    done, _ = plan(tmp_path, "h100:1x9", *NARROW)
    assert done.returncode == 2 and "write h100:2x8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
