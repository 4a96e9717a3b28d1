"""The benches: counting kernels in a program, timing, refusals, the PyTorch twin."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from apt_jax.bench import attention, cpu, programs, report
from apt_jax.bench.cases import CASES, MARKERS, AttentionCase
from apt_jax.bench.device_less import Compiled, complaint, count_kernels, table
from apt_jax.bench.report import Results
from apt_jax.bench.timing import Timing, interleaved, measure
from apt_jax.cli import main as cli
from apt_jax.config import load_config
from apt_jax.kernels import dispatch
from apt_jax.kernels.choice import BACKENDS
from apt_jax.models.mmdit import MMDiTConfig

HLO = """\
HloModule test, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %call.1 = bf16[4,8]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "apt_flash_forward"}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %call.1)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %a = (s32[], bf16[4,8]) parameter(0)
  %other = bf16[16,8]{1,0} custom-call(%a), custom_call_target="apt_flash_dq"
  %fusion = bf16[2,2]{1,0} fusion(%a), metadata={op_name="apt_flash_forward"}
  ROOT %loop = (s32[], bf16[4,8]) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"36"}}
}
"""


def test_kernels_are_counted_as_often_as_loops_turn():
    found = count_kernels(HLO, ["apt_flash_forward", "apt_flash_dkv", "apt_flash_dq"])
    assert found.kernels == {"apt_flash_forward": 36, "apt_flash_dkv": 0, "apt_flash_dq": 1}
    assert (found.largest, found.result) == (128, 128)
    assert found.written == 2 * 2 * 2  # the fusion; kernels' results and tuples do not count
    assert count_kernels(HLO, ["apt_flash_forward"]).result == 32
    aside = count_kernels(HLO, ["apt_flash_forward"], ["apt_flash_dq"])
    assert aside.kernels["apt_flash_dq"] == 1 and aside.result == 32


def test_an_asynchronous_fusion_writes_its_result_once():
    """What starts it names its operand beside its result, and its inside is a fusion's."""
    text = """HloModule one, is_scheduled=true

%inside (x: bf16[36,8,8]) -> bf16[8,8] {
  %x = bf16[36,8,8]{2,1,0} parameter(0)
  ROOT %cut = bf16[8,8]{1,0} slice(%x)
}

ENTRY %main (a: bf16[36,8,8]) -> bf16[8,8] {
  %a = bf16[36,8,8]{2,1,0} parameter(0)
  %start = ((bf16[36,8,8]{2,1,0}), bf16[8,8]{1,0}, s32[]) fusion-start(%a), kind=kLoop, calls=%inside
  ROOT %done = bf16[8,8]{1,0} fusion-done(%start)
}
"""
    assert count_kernels(text, []).written == 2 * 8 * 8


def test_a_kernel_whose_attributes_wrap_does_not_end_its_computation():
    """Splash attention's lines go on below, beginning with two braces."""
    wrapped = HLO.replace('custom_call_target="apt_flash_dq"',
                          'custom_call_target="tpu", frontend_attributes={kernel_metadata={\n}}')
    assert count_kernels(wrapped, ["apt_flash_forward"]).kernels == {"apt_flash_forward": 36}


def test_what_is_wrong_with_a_program():
    assert complaint({"a": 1}, {"a": 1}, []) == ""
    assert complaint({"a": 0}, {"a": 1}, []) == "a runs 0 times, not 1"
    assert complaint({"a": 1}, {"a": 1}, ["dot.1 f32[9,9]", "x", "y"]) == (
        "dot.1 f32[9,9] is a table of scores, and so are 2 others")
    row = Compiled("case", "pallas", "forward", "H100", {"a": 0}, {"a": 1}, 9, 0, 1.0, "bad")
    assert not row.passes and "FAILS: bad" in table([row])


def test_every_fast_backend_has_markers_and_every_case_is_whole():
    assert set(MARKERS) == set(BACKENDS) - {"auto", *dispatch.PLAIN}
    for case in CASES.values():
        assert case.flops["forward"] == 4 * (
            case.batch * case.heads * case.queries * case.keys * case.head_dim)
        assert len(case.abstract()) == (3 if case.hidden is None else 4)


@pytest.mark.parametrize("program, remat, wanted", [
    ("one-step inference", "full", (36, 0)),
    ("D step", "full", (108, 36)), ("D step", "attention", (72, 36)),
    ("D step", "dots", (72, 36)),
    ("G step", "full", (144, 72)), ("G step", "none", (72, 72)),
])
def test_expected_kernels_of_the_8b_programs(program, remat, wanted):
    config = load_config("configs/seaweed_8b_video.py", [f"--config.model.remat={remat}"])
    forwards, backwards = wanted
    assert programs.expected_kernels(program, config, "pallas") == {
        "apt_flash_forward": forwards, "apt_flash_dkv": backwards, "apt_flash_dq": backwards}
    if remat in ("attention", "dots"):  # tokamax keeps its log-sum-exp to itself and runs again
        forwards += backwards
    assert programs.expected_kernels(program, config, "tokamax") == {
        "mosaic_gpu": forwards + 2 * backwards}


def test_a_ring_takes_a_turn_for_each_of_its_places():
    config = load_config("configs/seaweed_8b_video.py",
                         ["--config.mesh.context=8", "--config.mesh.ulysses=2"])
    for backend in ("pallas", "tokamax"):  # the others keep their log-sum-exp to themselves
        found = programs.expected_kernels("one-step inference", config, backend)
        assert found == {"apt_flash_forward": 4 * 36, "apt_flash_dkv": 0, "apt_flash_dq": 0}


@pytest.mark.parametrize("apart", [True, False])
def test_calls_are_waited_for_one_by_one_where_they_must_be(apart):
    under_way, most = set(), []

    def call(i):
        under_way.add(len(most))
        most.append(len(under_way))

    measure(call, [(0,)], lambda _: under_way.clear(), seconds=0.01, warmup=1, apart=apart)
    assert (max(most) == 1) == apart


def test_timing_finds_the_median_of_waited_calls():
    timing = measure(lambda s: s, [(0.002,), (0.002,)], time.sleep, seconds=0.05)
    # many calls share one wait, as asynchronous calls of a device do
    assert timing.samples >= 3 and timing.low <= timing.median <= timing.high
    slow = measure(lambda: time.sleep(0.06), [()], lambda _: None, seconds=0.2)
    assert 0.06 <= slow.median < 0.12 and 0 <= slow.spread < 1


def test_slow_calls_are_sampled_often_enough_for_quartiles():
    calls = []
    assert measure(lambda: calls.append(1), [()], lambda _: None, seconds=0.0).samples == 5
    calls.clear()
    assert measure(lambda: calls.append(1), [()], lambda _: time.sleep(0.06), seconds=0.01,
                   warmup=0).samples == 5 and len(calls) == 6


def test_contenders_take_turns():
    order = []
    found = interleaved({name: ((lambda n=name: (order.append(n), time.sleep(0.06))), [()],
                                lambda _: None) for name in "ab"}, rounds=2, seconds=0.1)
    runs = "".join(order)
    assert set(found) == {"a", "b"} and "".join(sorted(set(runs))) == "ab"
    assert runs.index("b") < runs.rindex("a")


def test_attention_is_timed_and_refusals_are_kept(tmp_path):
    case = AttentionCase("tiny", 20, 20, 1, 8, hidden=3, dtype="float32")
    results, lines = Results(tmp_path / "rows.json", "cpu"), []
    attention.run([case], ["oracle", "pallas", "cudnn", "torch"], results, seconds=0.02,
                  tell=lines.append)
    assert len(results.rows) == 8 == len(lines)
    for backend in ("oracle", "pallas"):
        for part in ("forward", "gradient"):
            row = results.rows[f"tiny/{part}/{backend}"]
            assert row["median"] > 0 and row["tflops"] > 0
    assert "NVIDIA GPU" in results.rows["tiny/forward/cudnn"]["skipped"]
    lines.clear()
    attention.run([case], ["oracle"], Results(tmp_path / "rows.json", "cpu"), tell=lines.append)
    assert lines == []  # nothing is measured twice


SMALL = dict(width=32, depth=2, heads=2, head_dim=16, rope_axes=(4, 6, 6), text_width=24)


@pytest.mark.parametrize("modulation", ["shared", "per_block"])
def test_the_pytorch_twin_computes_the_same(modulation):
    pytest.importorskip("torch")
    case = cpu.CpuCase(MMDiTConfig(**SMALL, modulation=modulation), 2, (2, 4, 6), 5)
    for part in ("forward", "train"):
        made = cpu.contenders(case, part, ["apt_jax", "torch eager"])  # raises where they differ
        assert list(made) == ["apt_jax", "torch eager"]


def test_the_twins_take_the_same_training_steps():
    """The losses of three steps on different batches: the updates agree, not only the first value."""
    pytest.importorskip("torch")
    case = cpu.CpuCase(MMDiTConfig(**SMALL), 2, (1, 4, 4), 5)
    made = cpu.contenders(case, "train", ["apt_jax", "torch eager"])
    losses = [[float(np.asarray(call(*sets[i % 3]))) for i in range(1, 5)]
              for call, sets, _ in made.values()]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_twin_that_differs_is_an_error(monkeypatch):
    pytest.importorskip("torch")
    case = cpu.CpuCase(MMDiTConfig(**SMALL), 1, (1, 4, 4), 3)
    monkeypatch.setattr(cpu, "AGREE", 0.0)
    with pytest.raises(cpu.UserError, match="disagree"):
        cpu.contenders(case, "forward", ["apt_jax", "torch eager"])


def test_a_profile_says_which_kinds_of_our_operations_took_the_time(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    case = cpu.CpuCase(MMDiTConfig(**SMALL), 1, (1, 4, 4), 3)
    monkeypatch.setattr(cpu, "CASES", {"tiny": case})
    results, lines = Results(None, "cpu"), []
    cpu.run(["tiny"], ["apt_jax", "torch eager"], results, seconds=0.1, profile=str(tmp_path),
            tell=lines.append)
    row = results.rows["tiny/train"]
    kinds = [kind for kind, _, _ in row["costliest"]]
    assert len(set(kinds)) == len(kinds) > 3 and not any(kind[-1].isdigit() for kind in kinds)
    assert {"dot", "ynn_fusion"} & set(kinds)
    assert 0 < row["costliest"][0][1] <= row["device_seconds"]
    assert f"ours, ms: {kinds[0]} " in lines[-1]


def test_a_row_that_lacks_a_contender_is_run_again_with_all(monkeypatch):
    """--no-compile first, then the whole command: torch.compile is not left out for ever."""
    pytest.importorskip("torch")
    raced = []
    monkeypatch.setattr(cpu, "contenders", lambda case, part, names: names)
    monkeypatch.setattr(cpu, "interleaved", lambda names, seconds: raced.append(list(names)) or {
        name: Timing(1.0 + i, 1.0, 1.0, 9) for i, name in enumerate(names)})
    results = Results(None, "cpu")
    for names in (cpu.CONTENDERS[:2], cpu.CONTENDERS, cpu.CONTENDERS[:2], cpu.CONTENDERS[::2]):
        cpu.run(["demo"], names, results, tell=lambda _: None)
    assert raced == [list(cpu.CONTENDERS[:2])] * 2 + [list(cpu.CONTENDERS)] * 2
    assert results.rows["demo/train"]["ratio_to_apt_jax"] == {
        "apt_jax": 1.0, "torch eager": 2.0, "torch.compile": 3.0}
    assert results.rows["demo/train"]["load_before"] >= 0
    assert "torch" in results.rows["demo/train"]["packages"]


def test_the_devices_of_quality_and_of_the_cpu_bench_are_named(monkeypatch):
    """fp8 may run on a GPU; cpu must not."""
    from apt_jax.bench import quality

    made = []
    monkeypatch.setattr(report, "Results", lambda path, device: made.append(device))
    monkeypatch.setattr(quality, "report", lambda *a, **k: True)
    for name in ("distance_rows", "penalty_rows", "fd_rows"):
        monkeypatch.setattr(quality, name, lambda *a, **k: None)
    monkeypatch.setattr(cpu, "run", lambda *a, **k: None)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100")])
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *a: asked.append(a))
    assert cli.main(["bench", "fp8"]) == 0 and asked == []
    assert cli.main(["bench", "cpu"]) == 0
    assert made == ["NVIDIA H100"] * 2 and asked == [("jax_platforms", "cpu")]


def test_the_large_network_has_100m_parameters():
    from apt_jax.models.mmdit import MMDiT
    from apt_jax.nn.functional import Network

    net = Network.build(lambda rngs: MMDiT(cpu.CASES["mmdit_100m"].config, rngs=rngs))
    assert 95e6 < net.parameter_count() < 120e6


def test_a_forward_pass_is_timed_on_this_machine(capsys, tmp_path):
    out = tmp_path / "rows.json"
    code = cli.main(["bench", "forward", "--config", "configs/demo_image.py", "--seconds", "0.02",
                     "--json", str(out), "--config.model.depth=1", "--config.mesh.fsdp=1",
                     "--config.mesh.replica=8"])
    assert code == 0, capsys.readouterr().err
    rows = json.loads(out.read_text())["rows"]
    name = "demo_image/forward/{} mesh.fsdp=1 mesh.replica=8 model.depth=1"
    assert list(rows) == [name.format("torch"), name.format("bfloat16/auto")]
    row = rows[name.format("bfloat16/auto")]
    assert row["median"] > 0 and row["tflop"] > 0 and row["samples_per_call"] == 8


@pytest.mark.parametrize("arguments, words", [
    (["attention", "--cases", "16kk"], "did you mean '16k'"),
    (["attention", "--backends", "flash"], "--backends 'flash' is unknown"),
    (["cpu", "--models", "huge"], "known: demo, mmdit_100m"),
    (["forward"], "needs --config"),
    (["train", "--config", "configs/demo_pretrain.py"], "stage is 'pretrain'"),
    (["forward", "--config", "configs/demo_image.py", "--weights", "int4"], "'int4' is unknown"),
    (["train", "--config", "configs/demo_image.py", "--steps", "G"], "did you mean 'G step'"),
    (["train", "--config", "configs/demo_image.py", "--backends", "cudnn_fp8"], "has no gradient"),
    (["fp8", "--kinds", "product"], "did you mean 'products'"),
    (["fp8", "--seeds", "1"], "--seeds 1: how far a seed moves the FD takes two"),
    (["forward", "--config", "configs/demo_image.py", "--backends", "pallsa"],
     "'pallsa' is unknown, did you mean 'pallas'"),
    (["attention", "--seconds", "-1"], "--seconds -1 is no time"),
    (["attention", "--json", "/proc/x/rows.json"], "--json /proc/x/rows.json: "),
    (["attention", "--json", "tests"], "--json tests: nothing can be written there"),
    (["vae", "--config", "configs/demo_image.py", "--decoders", "tile"], "did you mean 'tiles'"),
    (["vae", "--config", "configs/demo_image.py"], "the config has no latents"),
    (["pipeline", "--config", "configs/demo_image.py"], "the config has no latents"),
    (["attention", "--seconds", "nan"], "--seconds nan is no time"),
    (["cpu", "--seconds", "inf"], "--seconds inf is no time"),
    (["fp8", "--depths", "4", "0"], "--depths 0 is no network"),
    (["fp8", "--count", "-1"], "--count -1 is no number"),
    (["fp8", "--device-less"], "--device-less is for apt-jax bench attention, block, "),
    (["attention", "--device-less", "--profile", "x"], "--profile: nothing runs with --device-less"),
    (["block", "--device-less", "--seconds", "3"], "--seconds: nothing runs with --device-less"),
    (["cpu", "--device-less"], "--device-less is for apt-jax bench attention, block, "),
    (["cpu", "--topology", "v5p:2x2x1"], "--topology is for apt-jax bench attention, block, "),
    (["fp8", "--profile", "x"], "--profile is for"),
    (["attention", "--config", "configs/demo_image.py"], "--config is for apt-jax bench block"),
    (["attention", "--weights", "fp8"], "--weights is for apt-jax bench block"),
    (["attention", "--config.model.depth=1"], "--config.model.depth: apt-jax bench attention reads"),
    (["cpu", "--config.model.depth=1"], "--config.model.depth: apt-jax bench cpu reads no config"),
    (["forward", "--config", "configs/demo_image.py", "--rows", "1"], "--rows 1: that many rows"),
    (["attention", "--rows", "1"], "--rows is for apt-jax bench block"),
])
def test_wrong_requests_are_one_line(capsys, arguments, words):
    assert cli.main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
