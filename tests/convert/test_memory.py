"""A checkpoint larger than the memory that its conversion may take (own process, own peak).

The files are not synced to the disk here: that would time the disk.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import synthetic

from apt_jax.convert import engine
from apt_jax.convert.families import transformer_plan
from apt_jax.convert.tables import qwen_image
from apt_jax.tensor_files import Spec, open_folder, write_files

pytestmark = pytest.mark.slow
GIB = 2**30
# Half as wide as Qwen-Image: 113 MB a block in bfloat16, and 12 blocks are 1.4 GB.
MODEL = {**synthetic.QWEN, "width": 1536, "heads": 12, "head_dim": 128, "rope_axes": (16, 56, 56),
         "text_width": 3584, "depth": 12}
FILE_BYTES = 2 * 10**8
STEM = "diffusion_pytorch_model"

RUN = """
import os, sys
os.fsync = lambda handle: None
from apt_jax.cli.main import main
code = main(sys.argv[1:])
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
print("PEAK", int(peak) * 1024)
sys.exit(code)
"""


LOAD = """
import jax
from apt_jax.models.presets import make_generator
from apt_jax.parallel.mesh import make_mesh
from apt_jax.parallel.sharding import infer_shardings
from apt_jax.weights import load_generator, open_generator
with open_generator("ours") as (model, _):
    abstract = make_generator(model).abstract()
shardings = infer_shardings(abstract, make_mesh({"replica": 1, "fsdp": 8}))
_, params = load_generator("ours", shardings=shardings)
assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == sum(
    4 * leaf.size for leaf in jax.tree.leaves(abstract))
peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
print("PEAK", int(peak) * 1024)
"""


def peak(*arguments, cwd, code=RUN):
    """Peak resident bytes of one apt-jax command, without torch in it, or of other code."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          cwd=cwd)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK")[1])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A scratch folder that is gone after the test."""
    if shutil.disk_usage(tmp_path).free < 5 * GIB:
        pytest.skip("needs 5 GB of disk")
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    yield tmp_path
    shutil.rmtree(tmp_path)


def write(folder, depth):
    """A transformer folder of random bits in files of 200 MB: (plan, bytes, largest file)."""
    model = {**MODEL, "depth": depth}
    plan = transformer_plan(model)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(qwen_image.config_from(model)))
    # Random finite numbers: a bit of the exponent is cleared. Each tensor starts elsewhere.
    noise = np.random.default_rng(0).integers(0, 2**16, 2**24, np.uint16) & 0xBFFF
    specs = [Spec(name, synthetic.BFLOAT16, shape) for name, shape in plan.theirs.items()]

    def chunk(i, spec):
        size = spec.nbytes // 2
        start = (7919 * i) % (len(noise) - size)
        return noise[start:start + size].view(synthetic.BFLOAT16)

    write_files(folder, STEM, specs, (chunk(i, s) for i, s in enumerate(specs)), limit=FILE_BYTES)
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    return plan, sum(sizes), max(sizes)


def test_an_import_holds_no_more_than_a_few_tensors(folder):
    """Little more than half of the checkpoint, the process itself included."""
    plan, total, _ = write(folder / "source", MODEL["depth"])
    assert total > 1.25 * GIB
    used = peak("convert", "import", "--source", "source", "--to", "ours", cwd=folder)
    assert used < 0.75 * GIB, f"{used / 1e9:.2f} GB"
    with (open_folder(folder / "source", STEM) as theirs,
          open_folder(folder / "ours" / "transformer") as ours):
        for name, leaf in plan.leaves.items():
            for layer in (0, leaf.shape[0] - 1) if leaf.stacked else (None,):
                np.testing.assert_array_equal(
                    ours.read(name, layer).view(np.uint16),
                    engine.read_layer(plan, theirs, name, layer).view(np.uint16))


def test_an_export_likewise_and_the_bytes_come_back(folder):
    """Files of 0.7 GB, and less than that in memory."""
    _, total, _ = write(folder / "source", 5)
    peak("convert", "import", "--source", "source", "--to", "ours", cwd=folder)
    used = peak("convert", "export", "--checkpoint", "ours", "--to", "out", "--shard-gb", "0.2",
                cwd=folder)
    assert used < total, f"{used / 1e9:.2f} GB of {total / 1e9:.2f}"
    with open_folder(folder / "source", STEM) as before, open_folder(folder / "out", STEM) as after:
        assert set(before.tensors) == set(after.tensors) and len(after.files) > 3
        for name in before.tensors:
            assert before.read(name).tobytes() == after.read(name).tobytes(), name
    # Onto eight devices, whose memory is this process's too: the float32 parameters, and little
    # beside them.
    used = peak(cwd=folder, code=LOAD)
    assert 2 * total < used < 2 * total + 0.75 * GIB, f"{(used - 2 * total) / 1e9:.2f} GB beside"
