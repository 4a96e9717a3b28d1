"""The groups of measurements for an H100: every command is one that the CLI takes."""

import importlib.util
import json
import subprocess
from pathlib import Path

import jax
import pytest

from apt_jax.bench import attention, cases, pipeline, run
from apt_jax.cli import bench
from apt_jax.cli.main import parse_command
from apt_jax.config import load_config, validate

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("bench_h100", ROOT / "launch" / "bench_h100.py")
bench_h100 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_h100)


def commands(group, device_less=False):
    return [bench_h100.command(name, arguments, Path("out"), device_less)
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
            assert set(args.backends) <= set(attention.default_backends())
            continue
        validate(load_config(args.config, args.overrides))
        assert set(args.backends) <= {"tokamax", "cudnn", "pallas"} | (
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


def test_a_group_ends_in_time_and_reports_what_failed(monkeypatch):
    ran = []

    def run(line, cwd, env, timeout):
        ran.append((line[3:5], timeout))
        if len(ran) == 2:
            raise subprocess.TimeoutExpired(line, timeout)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert bench_h100.main(["inference", "--minutes", "0.5"]) == 75
    assert [what for what, _ in ran] == [["bench", "forward"], ["bench", "vae"]]
    assert all(0 < seconds <= 30 for _, seconds in ran)
    assert bench_h100.main(["training"]) == 0 and len(ran) == 5
    monkeypatch.setattr(subprocess, "run",
                        lambda line, **_: subprocess.CompletedProcess(line, 1))
    assert bench_h100.main(["training"]) == 1


def test_committed_rows_belong_to_their_files():
    """What is kept of device-less compiles passes, and names kernels that it counted."""
    files = sorted((ROOT / "docs/results/performance").glob("*_compiled.json"))
    assert files
    for path in files:
        rows = json.loads(path.read_text())["rows"]
        assert rows and all(row["passes"] and not row["error"] for row in rows.values()), path
