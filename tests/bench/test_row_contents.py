"""What the row of a bench says: memory, names, inputs, traces, and which program it timed."""

from __future__ import annotations

import gzip
import json

import jax
import numpy as np
import pytest
from small_configs import small

from apt_jax.bench import arrays, attention, case, memory, profile, programs, report
from apt_jax.bench.cases import AttentionCase
from apt_jax.bench.report import Results
from apt_jax.cli import main as cli
from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.kernels.choice import Hardware
from apt_jax.nn.rope import Rotation


def test_the_peak_of_memory_is_the_cases_own(monkeypatch):
    """The device's figure is of the whole process."""
    said = {"peak_bytes_in_use": 70, "bytes_in_use": 5}
    monkeypatch.setattr(memory, "memory_stats", lambda: said)
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    found = memory.peak(memory.planned(compiled), {"peak_bytes_in_use": 60, "bytes_in_use": 10})
    assert found["peak_bytes"] == 60 and found["planned_bytes"] > 0
    assert found["planned_over_peak"] == found["planned_bytes"] / 60
    other = memory.peak(memory.planned(compiled), {"peak_bytes_in_use": 70})
    assert other["peak_bytes"] is None and other["planned_over_peak"] is None
    assert memory.peak(memory.planned(compiled), {})["planned_bytes"] > 0
    said.clear()  # a CPU
    assert memory.peak(memory.planned(compiled), {})["peak_bytes"] is None and memory.device_memory() > 2**28
    row = {"median": 1.0, "low": 1.0, "high": 1.0, "backend": "pallas", "planned_bytes": 57 * 2**30,
           "peak_bytes": 60 * 2**30, "planned_over_peak": 0.95}
    assert case.line("a", row).endswith("planned 57.00 GiB, 0.950 of the peak of 60.00")
    assert "planned" not in case.line("a", {**row, "peak_bytes": None, "planned_over_peak": None})


def test_the_peak_of_a_device_is_that_of_its_longest_name():
    assert attention.peak_of("TPU v5 lite") == 197e12 < attention.peak_of("TPU v5p") == 459e12
    assert attention.peak_of("TPU v5") == 459e12 and attention.peak_of("TPU v6 lite") == 918e12
    assert attention.peak_of("NVIDIA H100 80GB HBM3") == 989e12 and attention.peak_of("cpu") is None


def test_the_processors_name_is_its_makers(tmp_path):
    table = tmp_path / "cpuinfo"
    table.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\n\nmodel name\t: other\n")
    assert report.processor(table) == "Some CPU @ 2.0GHz"
    table.write_text("processor: 0\n")
    assert report.processor(table) == report.processor(tmp_path / "none") != ""


def test_the_oracle_is_left_out_where_its_scores_do_not_fit():
    large = AttentionCase("8b", 47_104, 47_104, 24, 128)
    with pytest.raises(UserError, match="scores take 298 GiB, and the device has 80"):
        attention.check_oracle(large, "forward", 80 * 2**30)
    small = AttentionCase("16k", 16_384, 16_384, 16, 128)
    attention.check_oracle(small, "forward", 80 * 2**30)
    with pytest.raises(UserError, match="48 GiB"):
        attention.check_oracle(small, "gradient", 40 * 2**30)


def test_the_backward_pass_is_the_gradient_less_the_forward_pass():
    one, h100 = AttentionCase("", 1000, 1000, 10, 100), Hardware("gpu", "NVIDIA H100", 9.0)
    found = attention.backward(one, {"median": 0.05}, {"median": 0.03}, h100)
    assert found["backward_seconds"] == pytest.approx(0.02)
    assert found["backward_tflops"] == pytest.approx(2.5 * 4 * 1e9 / 0.02 / 1e12)
    assert found["backward_share_of_peak"] == pytest.approx(found["backward_tflops"] / 989)
    assert attention.backward(one, {"median": 0.05}, {"skipped": "x"}, h100) == {}


def test_inputs_are_drawn_once_for_all_backends(monkeypatch):
    drawn = []
    arrays = AttentionCase.arrays
    monkeypatch.setattr(AttentionCase, "arrays", lambda c, s: drawn.append(s) or arrays(c, s))
    one = AttentionCase("tiny", 16, 16, 1, 8, hidden=3, dtype="float32")
    results = Results(None, "cpu")
    assert attention.run([one], ["oracle", "pallas", "cudnn", "tokamax_choice"], results,
                         seconds=0.001, tell=lambda _: None) == 0
    assert drawn == [0, 1, 2] and len(results.rows) == 8
    sets = [arrays(one, seed) for seed in (0, 1)]
    assert abs(sets[0][0] - sets[1][0]).max() > 0.1 and not sets[0][3][0, :3].any()
    assert "tokamax" in results.rows["tiny/forward/tokamax_choice"]["skipped"]
    gradient = results.rows["tiny/gradient/oracle"]
    forward = results.rows["tiny/forward/oracle"]
    for backend in ("oracle", "pallas"):
        found = results.rows[f"tiny/gradient/{backend}"]["distances"]
        assert list(found) == ["dq", "dk", "dv"] and max(found.values()) < 2e-6
    assert forward["distances"]["out"] < 2e-6
    if gradient["median"] > forward["median"]:
        assert gradient["backward_seconds"] == gradient["median"] - forward["median"]


def test_auto_says_which_kernel_it_was(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 512, 2, 64), np.float32)
    few = jax.ShapeDtypeStruct((1, 1, 2, 64), np.float32)
    with dispatch.recording() as seen:
        jax.eval_shape(lambda q: dispatch.run(q, q, q), q)
    assert seen == {"xla"}
    h100 = Hardware("gpu", "NVIDIA H100", 9.0)
    with dispatch.choice.choosing(hardware=h100), dispatch.recording() as seen:
        jax.eval_shape(lambda q, k: dispatch.run(q, k, k), few, q)
        assert seen == set()  # few queries never have a kernel
        monkeypatch.setattr(dispatch, "_automatic", lambda r: "pallas")
        jax.eval_shape(lambda q: dispatch.run(q, q, q), q)
    assert seen == {"pallas"}
    row = {"median": 1.0, "low": 1.0, "high": 1.0, "backend": "auto", "selected": ["pallas"]}
    assert case.line("a", row).endswith("by pallas")


def test_the_share_of_the_peak_is_that_of_all_devices():
    half = case.rates(8 * 989e12 / 2, 1.0, "NVIDIA H100 80GB HBM3", 8)
    assert half["share_of_peak"] == pytest.approx(0.5) and half["tflops"] == pytest.approx(3956)


@pytest.mark.parametrize(("field", "flag"), [
    ("model.attention=cudnn", "--backends"), ("discriminator.matmul=fp8", "--weights")])
def test_what_a_bench_sets_itself_is_no_override(field, flag):
    with pytest.raises(UserError, match=f"{field.partition('=')[0]} itself; give {flag}"):
        programs.check_switches([f"--config.{field}"])
    programs.check_switches(["--config.model.depth=2"])


def test_a_call_takes_several_inputs_in_turns_and_its_trace_is_read(tmp_path):
    seen = []
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    a, n = (jax.ShapeDtypeStruct(s, d, sharding=here) for s, d in (((256, 256), np.float32),
                                                                  ((), np.int32)))

    def function(params, x, n):
        jax.debug.callback(lambda v: seen.append(int(v)), n)
        return params @ x

    row = case.time_case(case.Case("toy", "forward", "auto", jax.jit(function), (a, a, n)), "cpu",
                         0.001, tmp_path / "trace")
    jax.effects_barrier()
    assert set(seen) == {1, 2, 3} and row["selected"] == []
    assert 0 < row["device_seconds"] < 10 * row["high"] + 0.1
    assert 1 <= len(row["costliest"]) <= 10
    name, seconds, runs = row["costliest"][0]
    assert name and 0 < seconds and runs > 0
    assert [each[1] for each in row["costliest"]] == sorted(
        (each[1] for each in row["costliest"]), reverse=True)


def test_a_trace_has_a_folder_for_any_name_and_its_failure_leaves_the_row(tmp_path):
    one, other = (profile.folder_of(tmp_path, f"a/D step {'model.depth=1 ' * 40}{i}") for i in (1, 2))
    assert one != other and one.parent == tmp_path and len(one.name) < 100
    one.mkdir()
    blocked = tmp_path / "file"
    blocked.touch()
    found = profile.profiled(lambda: None, [()], lambda _: None, blocked / "trace")
    assert found["trace_error"] and found["device_seconds"] is None
    assert profile.folder_of("", "a") is None and profile.profiled(None, [], None, None) == {}


def test_a_gpus_kernels_are_read_from_its_streams_once(tmp_path):
    """As the profiler writes it: streams, and lines that sum up what lies on them."""
    names = {1: "/device:GPU:0", 2: "/host:CPU"}
    lines = {(1, 7): "Stream #13(Compute)", (1, 8): "Stream #14(MemcpyD2D)", (1, 9): "XLA Ops",
             (2, 1): "python"}
    runs = [(1, 7, "attention", 0, 40), (1, 7, "gemm", 40, 10), (1, 8, "copy", 45, 15),
            (1, 7, "attention", 100, 40), (1, 9, "fusion", 0, 140),
            (2, 1, "wait", 0, 500)]
    events = [{"ph": "M", "name": "process_name", "pid": p, "args": {"name": n}}
              for p, n in names.items()]
    events += [{"ph": "M", "name": "thread_name", "pid": p, "tid": t, "args": {"name": n}}
               for (p, t), n in lines.items()]
    events += [{"ph": "X", "pid": p, "tid": t, "name": n, "ts": s, "dur": d, "args": {"hlo_op": n}}
               for p, t, n, s, d in runs]
    path = tmp_path / "vm.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = profile.summary(profile.read(path), 2)
    assert found["device_seconds"] == pytest.approx(50e-6)  # 0 to 60 and 100 to 140, of two calls
    assert [(name, runs) for name, _, runs in found["costliest"]] == [
        ("attention", 1.0), ("copy", 0.5), ("gemm", 0.5)]


def test_arrays_of_one_shape_are_drawn_by_one_program():
    """A training state has hundreds of leaves: a program each took minutes to compile."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((7, 3), np.float32, sharding=here)
    before = arrays._filler.cache_info().misses
    made = arrays.random_like({"a": [leaf] * 5, "generator_opt": leaf})
    again = arrays.random_like({"a": [leaf]}, 1)
    assert arrays._filler.cache_info().misses == before + 2
    assert abs(made["a"][0] - again["a"][0]).max() > 0.5 and made["a"][0].min() < 0
    assert (made["generator_opt"] >= 0).all() and made["generator_opt"].max() < 0.1


def test_random_arrays_are_like_a_trained_network_s():
    """Norms' scales near zero make every score of attention equal, and 0.02 in eight bits is a zero
    or a subnormal number as often as not: a GPU is faster on those than on what it will compute."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def leaf(shape, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    eight = jax.numpy.float8_e4m3fn
    made = arrays.random_like(({
        "norm": {"scale": leaf((512,))}, "up": {"kernel": leaf((64, 64)), "bias": leaf((64,))},
        "down": {"kernel_fp8": leaf((256, 256), eight), "kernel_scale": leaf((256,))}},
        Rotation(leaf((9, 4)), leaf((9, 4))), {"x": leaf((64, 64)), "loss_mask": leaf((3,))}))
    (net, turn, given) = made
    assert abs(net["norm"]["scale"] - 1).max() < 0.1 and net["norm"]["scale"].std() > 0.01
    assert net["up"]["kernel"].std() == pytest.approx(0.02, rel=0.1)
    codes = net["down"]["kernel_fp8"]
    _, counts = np.unique(np.asarray(codes).view(np.uint8), return_counts=True)
    share = counts / counts.sum()
    assert -(share * np.log2(share)).sum() > 6  # bits; 5.3 of normal numbers times 0.02
    wide = codes.astype(np.float32)
    assert np.isfinite(wide).all() and (wide == 0).mean() < 0.01
    assert (wide * net["down"]["kernel_scale"]).std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_allclose(turn.cos**2 + turn.sin**2, 1, atol=1e-6)
    assert given["x"].std() == pytest.approx(1, rel=0.1) and (given["loss_mask"] == 1).all()


# -- the update that train runs --------------------------------------------------------------------


@pytest.mark.parametrize("name, overrides, samples, turns", [
    ("demo_image", ["--config.train.batch_size=8", "--config.train.accumulate=2"], 8, 2),
    ("demo_video", ["--config.train.clip_batch_size=6", "--config.train.accumulate=3",
                    "--config.data.frames=2,"], 6, 3)])
def test_the_update_that_train_runs_is_timed_where_it_is_asked_for(name, overrides, samples, turns):
    config = small(name, *overrides, "--config.model.attention=pallas")
    found, alone = (programs.train_cases(config, jax.devices()[:1], as_trained=asked)[1]
                    for asked in (True, False))
    assert found.samples == samples and alone.samples == 1
    assert found.args[2]["x"].shape[0] == samples and alone.args[2]["x"].shape[0] == 1
    assert f"batch {samples} in {turns}" in found.name and "batch" not in alone.name
    assert found.flops() == pytest.approx(samples * alone.flops(), rel=0.02)
    assert found.kernels["apt_flash_dq"] == 2 * turns  # G and D have a block each


def test_the_size_of_an_update_is_not_ignored(capsys):
    command = ["bench", "train", "--config", "configs/demo_image.py", "--config.train.accumulate=2"]
    assert cli.main(command) == 2
    assert "--as-trained" in capsys.readouterr().err
    assert cli.main(["bench", "forward", "--config", "configs/demo_image.py", "--as-trained"]) == 2
    assert "--as-trained is for apt-jax bench train" in capsys.readouterr().err


def test_memory_is_shared_with_pytorch(monkeypatch):
    """And taken at once where none of it is beside: in pieces it leaves gaps."""
    from apt_jax.cli import bench

    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    bench._share_memory(True)
    assert bench.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert bench.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"  # the user's
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    bench._share_memory(False)
    assert bench.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.94"
    assert bench.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
