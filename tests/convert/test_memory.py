"""A checkpoint larger than the memory that its conversion may take (own process, own peak)."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import synthetic

from apt_jax.convert.families import transformer_plan
from apt_jax.convert.tables import qwen_image
from apt_jax.tensor_files import SHARD_BYTES, Spec, open_folder, write_files

# 2.6 GB in bfloat16: 23 blocks as wide as half of Qwen-Image.
MODEL = {**synthetic.QWEN, "width": 1536, "heads": 12, "head_dim": 128, "rope_axes": (16, 56, 56),
         "text_width": 3584, "depth": 23}
FILE_BYTES = 2 * 10**8
STEM = "diffusion_pytorch_model"

RUN = """
import sys
from apt_jax.cli.main import main
code = main(sys.argv[1:])
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
print("PEAK", int(peak) * 1024)
sys.exit(code)
"""


def peak(*arguments, cwd):
    """Peak resident bytes of one apt-jax command, without torch in it."""
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True,
                          cwd=cwd)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK")[1])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A transformer folder of random bits in files of 200 MB."""
    folder = tmp_path_factory.mktemp("big")
    if shutil.disk_usage(folder).free < 3 * 2.7e9:
        pytest.skip("needs 8 GB of disk")
    yield _write(folder / "source")
    shutil.rmtree(folder)


def _write(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(qwen_image.config_from(MODEL)))
    # Random finite numbers: the exponent's upper bits are cleared. Each tensor starts elsewhere.
    noise = np.random.default_rng(0).integers(0, 2**16, 2**25, np.uint16) & 0xBFFF
    specs = [Spec(name, synthetic.BFLOAT16, shape)
             for name, shape in transformer_plan(MODEL).theirs.items()]

    def chunk(i, spec):
        size = spec.nbytes // 2
        start = (7919 * i) % (len(noise) - size)
        return noise[start:start + size].view(synthetic.BFLOAT16)

    write_files(folder, STEM, specs, (chunk(i, s) for i, s in enumerate(specs)), limit=FILE_BYTES)
    return folder


def test_memory_stays_below_the_checkpoint(big):
    """Both ways, and the bytes are the same: at most the largest file and 2 GiB; in fact far less."""
    files = list(big.glob("*.safetensors"))
    total, largest = (f(p.stat().st_size for p in files) for f in (sum, max))
    allowed = largest + 2 * 2**30
    assert total > allowed and len(files) > 10
    root = big.parent
    for arguments in (["import", "--source", "source", "--to", "ours"],
                      ["export", "--checkpoint", "ours", "--to", "out", "--shard-gb", "0.2"]):
        used = peak("convert", *arguments, cwd=root)
        assert used < allowed
        assert used < 2**30, f"{arguments[0]}: {used / 1e9:.2f} GB"
    assert total < SHARD_BYTES and (root / "ours/transformer/model.safetensors").is_file()
    with open_folder(big, STEM) as before, open_folder(root / "out", STEM) as after:
        assert set(before.tensors) == set(after.tensors)
        for name in before.tensors:
            assert before.read(name).tobytes() == after.read(name).tobytes(), name
