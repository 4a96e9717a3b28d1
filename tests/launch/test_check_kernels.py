"""launch/check_kernels.py tells kernels that compute attention from those that do not."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "launch" / "check_kernels.py")
check_kernels = importlib.util.module_from_spec(spec)
sys.modules["check_kernels"] = check_kernels  # where its dataclass looks for its names
spec.loader.exec_module(check_kernels)


def test_right_kernels_pass_and_absent_ones_are_left_out(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert check_kernels.main(["--backends", "hopper", "pallas", "cudnn", "--cases", "one tile",
                               "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    for name in ("hopper", "pallas"):
        row = rows[f"one tile/{name}"]
        assert set(row["distances"]) == {"out", "dq", "dk", "dv"}
        assert max(row["distances"].values()) < 5e-3 and row["queries"] == 128
    assert "NVIDIA GPU" in rows["one tile/cudnn"]["skipped"]
    assert check_kernels.main(["--backends", "fp8", "--json", str(tmp_path / "fp8.json")]) == 0
    rows = json.loads((tmp_path / "fp8.json").read_text())["rows"]
    assert "widened first" in rows["product/fp8"]["skipped"] and len(rows) == 2
    assert check_kernels.main(["--backends", "cudnn", "--cases", "one tile", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("left out") == 3  # the other processes wrote to the terminal themselves


def test_a_kernel_that_hangs_holds_up_no_other(tmp_path, monkeypatch, capsys):
    file, ran = tmp_path / "found.json", []

    def run(command, env, timeout):
        ran.append(command[command.index("--backends") + 1])
        if ran[-1] == "hopper":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    command = ["--backends", "hopper", "pallas", "--limit", "5", "--json", str(file)]
    assert check_kernels.main(command) == 1 and ran == ["hopper", "pallas"]
    assert "hopper: no end within 5 s" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [lambda q, k, v, *mask: v + 0.0 * q,
                                   lambda q, k, v, *mask: jnp.full_like(q, jnp.nan) * q])
def test_wrong_kernels_fail(wrong, monkeypatch, capsys):
    monkeypatch.setattr(check_kernels, "attention", wrong)
    assert check_kernels.main(["--backends", "pallas", "--cases", "one tile"]) == 1
    assert "FAILED: out is" in capsys.readouterr().out


def test_products_in_eight_bits_are_held_to_the_same_factors(monkeypatch):
    """Here both sides are widened; a product of other factors is seen."""
    found = check_kernels.compared_products(48, 64, 32)
    assert set(found) == {"y", "dx", "dw"} and max(found.values()) < 1e-6
    real, calls = check_kernels.fp8.matmul, []

    def wrong(x, w):
        calls.append(1)
        return real(x, w.at[:8].set(0) if len(calls) == 1 else w)

    monkeypatch.setattr(check_kernels.fp8, "matmul", wrong)
    assert check_kernels.compared_products(48, 64, 32)["y"] > 0.1


def test_a_kernel_for_inference_is_checked_forward(monkeypatch):
    """The one in eight bits, emulated: what it takes out of its result for hidden keys is seen."""
    from apt_jax.kernels import cudnn_fp8

    case = check_kernels.Small(256, 384, head_dim=64, mask="some")
    monkeypatch.setattr(check_kernels.dispatch, "refusal", lambda *_: None)
    monkeypatch.setattr(check_kernels.dispatch, "select", lambda backend, *_, **__: backend)
    found = check_kernels.distances(case, "cudnn_fp8")
    assert set(found) == {"out"} and found["out"] < check_kernels.limit("cudnn_fp8", "bfloat16")
    real = cudnn_fp8._without_hidden
    monkeypatch.setattr(cudnn_fp8, "_without_hidden",
                        lambda lse, *rest: real(lse + 20, *rest))  # a sum of something else
    assert check_kernels.distances(case, "cudnn_fp8")["out"] > 0.1


@pytest.mark.parametrize("name", check_kernels.CASES)
def test_cases_have_a_visible_key_each(name):
    case = check_kernels.CASES[name]
    q, k, v, dout, *mask = case.arrays()
    assert k.shape == v.shape and q.shape == dout.shape
    assert (q.ndim == 5) == bool(case.ways)
    for keys in mask:
        assert keys.shape == (case.batch, case.keys) and bool(keys.any(1).all())
        assert not bool(keys.all())
