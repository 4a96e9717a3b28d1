"""The groups of measurements for an H100: every command is one that the CLI takes."""

import importlib.util
import json
import os
import shlex
import subprocess
from pathlib import Path

import jax
import pytest

from apt_jax.bench import attention, cases, pipeline, run
from apt_jax.bench.report import row_name
from apt_jax.cli import bench
from apt_jax.cli.main import parse_command
from apt_jax.config import load_config, validate
from apt_jax.parallel.flags import check

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("bench_h100", ROOT / "launch" / "bench_h100.py")
bench_h100 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_h100)


def commands(group, device_less=False):
    return [bench_h100.command(name, arguments, Path("out"), Path("cache"), device_less)
            for name, arguments in bench_h100.GROUPS[group]]


@pytest.mark.parametrize("group", bench_h100.GROUPS)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_command_is_understood(group, compiled, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(group, compiled):
        args, module = parse_command("bench", command)
        assert module is bench
        assert args.device_less == compiled
        assert args.json.startswith("out/")
        assert args.json.endswith("_h100_compiled.json" if compiled else "_h100.json")
        if args.what == "attention":
            assert set(args.cases) <= set(cases.CASES)
            assert set(args.backends) <= set(cases.BACKENDS_OF["cuda"] if compiled
                                             else attention.default_backends())
            continue
        validate(load_config(args.config, args.overrides))
        assert set(args.backends) <= {"tokamax", "cudnn", "hopper", "pallas"} | (
            set() if args.what == "train" else set(cases.INFERENCE_ONLY))
        assert set(args.decoders) <= set(pipeline.DECODERS)


@pytest.mark.parametrize("group", bench_h100.GROUPS)
def test_every_command_has_programs(group, monkeypatch):
    """A config without the size of a sample is understood, and has none."""
    monkeypatch.chdir(ROOT)
    for command in commands(group):
        args, _ = parse_command("bench", command)
        if args.what == "attention":
            continue
        case = next(run.cases(bench._plan(args, jax.devices()[:1], args.backends or ["auto"])))
        assert case.name and jax.tree.leaves(case.args)


def test_no_two_commands_of_a_file_are_the_same_rows(monkeypatch):
    """A row's name tells overrides apart; the configs behind them must differ too."""
    monkeypatch.chdir(ROOT)
    for group in ("inference", "training"):
        seen = [(c[0], load_config(args.config, args.overrides).to_json_best_effort())
                for c in commands(group) for args in [parse_command("bench", c)[0]]]
        assert len(set(seen)) == len(seen)


@pytest.fixture
def flags(monkeypatch):
    """What XLA would answer; asking it takes a process."""
    monkeypatch.setattr(check, "known_value", lambda platform, hosts, say: f"--xla_{platform}={hosts}")


def test_a_group_ends_in_time_and_reports_what_failed(monkeypatch, flags):
    ran, lines = [], []
    for name in list(os.environ):  # a user's own are kept
        if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")):
            monkeypatch.delenv(name)

    def run(line, cwd, env, timeout):
        ran.append((line[3:5], timeout))
        lines.append((line, env))
        if len(ran) == 2:
            raise subprocess.TimeoutExpired(line, timeout)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert bench_h100.main(["inference", "--minutes", "0.5"]) == 75
    assert [what for what, _ in ran] == [["bench", "forward"], ["bench", "vae"]]
    assert all(0 < seconds <= 30 for _, seconds in ran)
    assert bench_h100.main(["training", "--out", "elsewhere"]) == 0 and len(ran) == 5
    line, env = lines[-1]
    assert Path(line[line.index("--json") + 1]) == Path("elsewhere/train_wan_h100.json").resolve()
    assert env["JAX_COMPILATION_CACHE_DIR"] == str(Path("elsewhere/.cache/programs").resolve())
    assert env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0" and "PATH" in env
    # What README tells users to export, in front of what they did.
    assert env["XLA_FLAGS"] == f"--xla_gpu=1 {os.environ['XLA_FLAGS']}"
    assert bench_h100.main(["training", "--device-less"]) == 0
    assert lines[-1][1]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    monkeypatch.setattr(subprocess, "run",
                        lambda line, **_: subprocess.CompletedProcess(line, 1))
    assert bench_h100.main(["training"]) == 1


def test_a_row_that_breaks_its_process_holds_up_no_other(monkeypatch, flags):
    """The command goes on in another process; four of them at most."""
    codes = iter([75, -6, 0, 1, *[75] * 4, 0])
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda line, **_: (
        ran.append(line[4]), subprocess.CompletedProcess(line, next(codes)))[1])
    assert bench_h100.main(["inference"]) == 1
    assert ran == ["forward"] * 3 + ["vae"] + ["pipeline"] * 4 + ["forward"]


def test_each_training_step_has_a_process_of_its_own(monkeypatch, flags):
    """As many processes as there are rows; one that breaks is no row of them."""
    assert all(c[c.index("--rows") + 1] == "1" for c in commands("training"))
    assert not any("--rows" in c for c in commands("training", device_less=True))
    assert any("--seconds" in c for c in commands("attention"))
    assert not any("--seconds" in c for c in commands("attention", device_less=True))
    codes = iter([*[bench_h100.MORE] * 9, -9, 0, 75, bench_h100.MORE, 0, 0])
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda line, **_: (
        ran.append(line), subprocess.CompletedProcess(line, next(codes)))[1])
    assert bench_h100.main(["training"]) == 0 and len(ran) == 15


PERFORMANCE = ROOT / "docs/results/performance"


def committed(pattern: str):
    found = [(path.name, json.loads(path.read_text()))
             for path in sorted(PERFORMANCE.glob(pattern))]
    assert found
    return found


def test_committed_rows_say_how_they_came_about():
    for name, content in committed("*.json"):
        assert content["device"] and content["cpu"] and content["versions"]["jax"], name
        assert "jax-cuda12-plugin" in content["versions"] or "h100" not in name
        for row in content["rows"].values():
            command = shlex.split(row["command"])
            assert command[:2] in (["apt-jax", "bench"], ["python", "launch/ask_cudnn.py"]), name
            assert Path(command[command.index("--json") + 1]).name == name


def test_committed_rows_say_which_check_of_scores_they_passed():
    """Today's tells a table by its dimensions; before, an array was compared with the scores' size.
    The page says which rows had which."""
    said = (ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines()
    dimensions, size, nothing = set(), [], []
    for path, content in committed("*_compiled.json"):
        for name, row in content["rows"].items():
            if "tables" in row:
                assert row["tables"] == [], (path, name)
                dimensions.add((path, name, row["revision"]))
            elif row["scores"]:
                assert row["largest"] < row["scores"], (path, name)
                size.append((path, row.get("revision", "")))
            else:
                assert row["backend"] == "xla", (path, name)
                nothing.append((path, row["revision"]))

    def line(count):
        (found,) = [each for each in said if each.startswith(f"| {count}, ")]
        return found

    of_today = line(len(dimensions))
    for path, _, revision in dimensions:
        assert path in of_today and revision in of_today
    for path, revision in size:
        assert (revision or path.removesuffix("_compiled.json")) in line(len(size)), path
    for _, revision in nothing:
        assert revision in line(len(nothing))


def test_committed_rows_belong_to_their_files(monkeypatch):
    """What is kept of device-less compiles passed the check of its day, by the kernel and for the
    device of its command, with the overrides that its name says."""
    monkeypatch.chdir(ROOT)
    for path, content in committed("*_compiled.json"):
        for name, row in content["rows"].items():
            assert row["passes"] and not row["error"], path
            assert row["kernels"] == row["wanted"], path
            args, _ = parse_command("bench", shlex.split(row["command"])[2:])
            assert args.device_less and content["device"] == f"{args.topology} (compiled only)"
            assert row["backend"] in [*(args.backends or cases.MARKERS), "xla"], path
            said = [word for word in name.split() if "=" in word]
            if name.startswith("seaweed"):
                assert row_name("", overrides=args.overrides).split() == sorted(said), path
            if "D step" in name or "G step" in name:  # the config's own was another when they ran
                assert any("remat=" in override for override in args.overrides), path
