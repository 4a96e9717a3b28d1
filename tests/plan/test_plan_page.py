"""The page of the committed plans: what it says of made-up ones, and that it is up to date."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from apt_jax.cli.main import main
from apt_jax.parallel.flags import compiler_options
from apt_jax.plan import page
from apt_jax.plan.measure import UNREAD

ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("plans", ROOT / "launch/plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(compute, exposed, once, microbatches, peak=60.0, hidden=0.5, notes=()):
    gather = {"kind": "all-gather", "axes": "fsdp", "seconds": 2.0, "overlapped": hidden}
    total = {"kind": "all-reduce", "axes": "fsdp+context", "seconds": 0.81, "overlapped": 1.0}
    return {"refused": "", "peak_gib": peak, "flops_forward_tflop": 1363.0, "floor_seconds": 0.5,
            "compute_seconds": compute, "exposed_seconds": exposed,
            "step_seconds": compute + exposed, "exposed_once_seconds": once, "microbatches": microbatches,
            "parts_gib": {"EMA": 3.8},
            "context_gib": 6.0, "context_minimum_gib": 4.0, "steady_collectives": [gather],
            "collectives": [gather, total], "notes": list(notes)}


def result(devices, microbatches, peak=60.0, turn=0.1, once=1.0):
    step = program(8.0 * microbatches, turn * microbatches + once, once, microbatches, peak)
    return {"command": "apt-jax plan", "versions": {}, "plan": {
        "topology": f"h100:{devices // 8}x8", "devices": devices, "mesh": {"fsdp": devices},
        "batch": 2048, "microbatch": 2,
        "tokens": 46800, "usable_gib": 74.4, "fits": True,
        "programs": {"D step": step, "one-step inference": {**step, "peak_gib": 99.0}}}}


@pytest.fixture
def results():
    return {"seaweed_8b_video_h100_1x8": result(8, 1024, peak=68.2),
            "seaweed_8b_video_h100_8x8": result(64, 128, peak=43.5),
            "seaweed_8b_video_h100_128x8": result(1024, 8, turn=0.4, once=3.0)}


def test_weak_scaling_takes_the_turns_of_the_largest(results):
    rows = page.weak_scaling(results)
    assert [r["devices"] for r in rows] == [8, 64, 1024] and {r["turns"] for r in rows} == {8}
    assert [r["seconds"] for r in rows] == pytest.approx(
        [8 * 8.1 + 1, 8 * 8.1 + 1, 8 * 8.4 + 3.0])
    text = page.scaling_text(rows)
    assert "100.0%" in text and f"{100 * 65.8 / 70.2:.1f}%" in text and "450 GB/s" in text


def test_targets_are_said_with_their_misses(results):
    text = page.targets(results)
    assert "<= 70 GiB, one clip per 4 GPUs: 68.2 GiB, met" in text
    assert "missed by 3.5 GiB" in text
    assert "| seaweed_8b_video_h100_1x8 | D step | 50%, 0.0% | none | 1.50 | unexplained, a |" in text
    assert "- **a** Tokens" in text and "**b**" not in text  # the reasons that the table names
    step = results["seaweed_8b_video_h100_1x8"]["plan"]["programs"]["D step"]
    step["step_seconds"] = 81.0
    step["notes"] = [f"all-reduce over {axes}, where a reduce-scatter would do, of {size} MiB, "
                     f"{times} times (x)" for axes, size, times in (
                         ("fsdp+context", 200, 4), ("fsdp", 5, 2048), ("context", 300, 9))]
    assert "| 50%, 1.2% | 2, up to 200 MiB, up to 2,048 times, 1.0% | 1.50 |" in page.targets(results)
    results["wan_14b_video_h100_8x8"] = results.pop("seaweed_8b_video_h100_1x8")  # of any stage
    assert "- **f** Wan 14B" in page.targets(results)
    step["context_gib"] = 4.0
    step["steady_collectives"], step["notes"] = [], []
    assert "| none | none | 1.00 | met |" in page.targets(results)
    for least in (None, 0.0):  # a ring; a file from before the least of its stage was counted
        step["context_minimum_gib"] = least
        assert "| none | none | not known | tokens not judged |" in page.targets(results)
    step["context_gib"] = 0.0
    assert "| none | none |  | met |" in page.targets(results)
    step["notes"] = [f"2 collectives {UNREAD} (x): traffic and time are without them"]
    assert "| gathers not judged, sums not judged, tokens not judged |" in page.targets(results)


def test_the_reason_of_the_video_stages_tokens_is_not_the_distillations(results):
    name = "seaweed_8b_consistency_h100_8x8"
    results[name] = results["seaweed_8b_video_h100_8x8"]
    step = results[name]["plan"]["programs"]["D step"]
    step["context_gib"] = 1.2 * step["context_minimum_gib"]
    assert "| none | 1.20 | unexplained, unexplained |" in page.targets(results)


def test_the_page_lists_what_is_missing_and_what_was_refused(results, tmp_path):
    step = results["seaweed_8b_video_h100_8x8"]["plan"]["programs"]["D step"]
    step["refused"] = "Used 120G of 95G"
    page.write(tmp_path, results,
               {**dict.fromkeys(results, "x"), "other": "apt-jax plan --config o"})
    text = (tmp_path / "README.md").read_text()
    assert "- other: `apt-jax plan --config o`" in text and "Used 120G of 95G" in text
    assert text.count("seaweed_8b_video_h100_8x8.json") == 1


def test_flags_that_are_not_todays_are_told(results):
    names, plans = list(results), [result["plan"] for result in results.values()]
    text = page.flags(results)  # none of these files has any
    assert len(text.splitlines()) == 3 and "before the flags were kept, so perhaps" in text
    assert all(name in text for name in names)
    for plan in plans:
        hosts = int(plan["topology"].split(":")[1].split("x")[0])
        plan["flags"] = compiler_options("auto", "cuda", hosts)
    assert "All were compiled with the flags that a run has today" in page.flags(results)
    del plans[0]["flags"]["xla_gpu_memory_limit_slop_factor"]
    plans[1]["flags"] = {**plans[1]["flags"], "xla_gpu_memory_limit_slop_factor": 95, "xla_old": True}
    text = page.flags(results)
    assert f"- {names[0]}: `xla_gpu_memory_limit_slop_factor` was not set and is 105." in text
    assert (f"- {names[1]}: `xla_gpu_memory_limit_slop_factor` was 95 and is 56, `xla_old` was True "
            "and is not set.") in text
    assert names[2] not in text and "before the flags" not in text


def test_a_result_has_its_revision_unless_programs_were_there_already(monkeypatch, tmp_path):
    script = load_script()
    name, commands = "wan_1_3b_video_h100_1x1", []

    def planned(words, env=None, **settings):
        commands.append(words)
        assert not {"XLA_FLAGS", "LIBTPU_INIT_ARGS"} & set(env)
        Path(words[words.index("--json") + 1]).write_text('{"programs": {}, "flags": {}}')
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(script.subprocess, "run", planned)
    monkeypatch.setattr(script, "revision", lambda configs: f"abc123 {configs.name}")
    monkeypatch.setattr(script, "PLANS", tmp_path / "plans")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_x=true")
    written = tmp_path / f"plans/{name}.json"
    for hlo in ("", str(tmp_path / "hlo")):
        assert script.run(name, hlo)
        assert json.loads(written.read_text())["revision"] == "abc123 configs"
    (tmp_path / "hlo" / name).mkdir(parents=True)
    (tmp_path / "hlo" / name / "D_step.json").write_text("{}")
    assert script.run(name, str(tmp_path / "hlo"))
    assert json.loads(written.read_text())["revision"] == "" and "--reuse" in commands[-1]


def test_every_case_is_a_command_that_the_cli_takes(monkeypatch):
    script = load_script()
    seen = []
    monkeypatch.setattr("apt_jax.cli.plan.run", lambda args: seen.append(args) or 0)
    for name in script.cases():
        assert main(script.command(name)) == 0
    assert {(Path(a.config).stem, a.topology) for a in seen} >= {
        ("seaweed_8b_video", "h100:1x8"), ("seaweed_8b_image", "h100:128x8"),
        ("wan_14b", "h100:8x8"), ("wan_1_3b_apt_video", "h100:1x1"),
        ("seaweed_8b_video", "v5p:4x4x4"), ("seaweed_8b_image", "v6e:16x16")}
    assert all((ROOT / a.config).is_file() for a in seen)
    monkeypatch.undo()
    assert main(["plan", "--config", "x.py", "--topology", "h100:1x8", "--reuse"]) == 2  # of what


def test_the_committed_page_is_what_the_committed_plans_say(tmp_path, monkeypatch):
    script = load_script()
    found = script.results()
    monkeypatch.setattr(page, "plot", lambda rows, path: True)
    page.write(tmp_path, found, {
        name: " ".join(["apt-jax", *script.command(name)]) for name in script.cases()})
    committed = (ROOT / "docs/plans/README.md").read_text()
    assert committed == (tmp_path / "README.md").read_text()
    assert "unexplained" not in committed
    for name, value in found.items():
        assert value["command"] == " ".join(["apt-jax", *script.command(name)])
        assert script.slim(value["plan"]) == value["plan"] and value["versions"]["jax"]
