"""A kernel that computes something else is no row: results are held to float32 before they are timed."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.bench import attention, attention_peers, check
from apt_jax.bench.cases import AttentionCase
from apt_jax.bench.report import Results
from apt_jax.cli import main as cli
from apt_jax.kernels.oracle import oracle

TINY = AttentionCase("t", 80, 90, 1, 8, hidden=3, dtype="float32")


def sets(part, case=TINY):
    return attention_peers.inputs_of(part, [tuple(case.arrays(seed)) for seed in (0, 1)])


def test_every_part_of_a_sequence_is_looked_at():
    at = check.probes(47_056)
    assert (at[0], at[-1], len(at)) == (0, 47_055, 64) and np.diff(at).max() < 800
    assert list(check.probes(3)) == [0, 1, 2] and list(check.probes(1)) == [0]


def test_a_gradients_cotangent_is_another_sets_queries():
    first, second = sets("gradient")
    assert len(first) == 5 and len(sets("forward")[0]) == 4
    np.testing.assert_array_equal(first[3], second[0])
    np.testing.assert_array_equal(second[3], first[0])


@pytest.mark.parametrize("broken, word", [(0, "dq"), (1, "dk"), (2, "dv")])
def test_each_wrong_gradient_is_found(broken, word):
    """By as little as one tile of it: 16 of 80 queries, of 90 keys."""
    (args, _), right = sets("gradient"), jax.jit(attention_peers.gradient_of(oracle))

    def call(*a):
        found = list(right(*a))
        found[broken] = found[broken].at[:, 32:48].set(0)
        return found

    assert check.wrong(check.distances(right, "gradient", args), check.SINGLE) == ""
    said = check.wrong(check.distances(call, "gradient", args), check.SINGLE)
    assert said.startswith(f"{word} is ") and said.count(" is ") == 1


def test_a_gradient_of_queries_that_have_none_is_found():
    """Where the cotangent is zero, so is dq: a kernel that mixes rows up is told."""
    args, right = sets("gradient")[0], jax.jit(attention_peers.gradient_of(oracle))

    def call(*a):
        dq, dk, dv = right(*a)
        return jnp.roll(dq, 1, axis=1), dk, dv

    assert "dq is 1." in check.wrong(check.distances(call, "gradient", args), check.SINGLE)


def test_what_is_not_finite_or_far_is_wrong():
    assert check.wrong({"out": 0.01, "dq": 0.009}, 0.01) == ""
    assert check.wrong({"out": math.nan}, 1.0) == "out is nan from float32, which may be 1"
    assert "inf" in check.wrong({"out": math.inf}, 1.0)
    assert check.limit("cudnn_fp8", "bfloat16") == 0.1
    assert check.limit("pallas", "bfloat16") == 0.01 > check.limit("pallas", "float32")


def test_a_kernel_that_gives_nothing_is_the_commands_status(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(attention, "attention", lambda q, k, v, mask, **_: q * jnp.nan)
    monkeypatch.setattr("apt_jax.bench.cases.CASES", {"t": TINY})
    assert cli.main(["bench", "attention", "--backends", "oracle", "--json", str(out)]) == 1
    assert "out is nan from float32" in capsys.readouterr().out

    def no_number(text):
        raise AssertionError(f"{text} is no JSON")

    rows = json.loads(out.read_text(), parse_constant=no_number)["rows"]
    assert set(rows) == {"t/forward/oracle", "t/gradient/oracle"}
    assert all(row["error"] and "median" not in row for row in rows.values())
    assert rows["t/forward/oracle"]["distances"] == {"out": None}
    assert Results(out, "cpu").failed("t/forward/oracle")


def test_pytorchs_peer_names_its_kernel_and_has_no_mask(monkeypatch):
    """With a mask its flash kernel could not serve; what is hidden is cut off instead."""
    torch = pytest.importorskip("torch")
    case = AttentionCase("t", 20, 30, 2, 16, hidden=7)
    for part in ("forward", "gradient"):
        call, inputs, wait, says = attention_peers.torch_sdpa(case, part, (0, 1), "cpu")
        q, k, v, *dout = inputs[0]
        assert k.shape == v.shape == (1, 2, 23, 16) and len(inputs) == 2
        got = call(*inputs[0])
        wait(got)
        assert says["mask"] == "hidden keys cut off" and says["kernels"] != ["unknown"]
        as_ours = lambda x: jnp.swapaxes(jnp.asarray(x.detach().float().numpy()), 1, 2)  # noqa: E731
        if part == "forward":
            np.testing.assert_allclose(
                as_ours(got), oracle(*map(as_ours, (q, k, v))), atol=0.02)
        else:
            want = attention_peers.gradient_of(oracle)(*map(as_ours, (q, k, v, *dout)))
            for one, other in zip(got, want, strict=True):
                np.testing.assert_allclose(as_ours(one), other, atol=0.05)
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert attention_peers.torch_sdpa(case, "forward", (0,), "cpu").says["kernels"] == ["unknown"]


def test_a_programs_attention_kernels_are_named():
    line = '%a = bf16[8] custom-call(%b), custom_call_target="{}", backend_config={{}}'
    for target, name in (("mosaic_gpu_v2", "Mosaic"), ("__cudnn$fmhaSoftmax", "cuDNN"),
                         ("__gpu$xla.gpu.triton", "Triton"), ("__cublas$gemm", "XLA")):
        assert attention_peers.kernels_in(line.format(target)) == [name]
