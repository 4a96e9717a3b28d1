"""The groups of measurements for an H100: every command is one that the CLI takes."""

import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from apt_jax.bench import attention, cases, pipeline, rows, run
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
    return [bench_h100.command(name, arguments, Path("out"), Path("cache"), device_less=device_less)
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
    """What XLA and nvidia-smi would answer; asking XLA takes a process."""
    monkeypatch.setattr(check, "known_value", lambda platform, hosts, say:
                        f"--xla_{platform}={hosts} --xla_gpu_enable_latency_hiding_scheduler=true")
    monkeypatch.setattr(bench_h100, "gpu_name", lambda: "h200")


def replaced(monkeypatch, statuses):
    """`run` gives these instead of running; the list of what it was asked."""
    asked = []

    def run(line, env, end, patience, file):
        asked.append((line, env, end, file))
        return next(statuses)

    monkeypatch.setattr(bench_h100, "run", run)
    return asked


def test_a_group_ends_in_time_and_reports_what_failed(monkeypatch, flags, tmp_path):
    for name in list(os.environ):  # a user's own are kept
        if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu=own --xla_other=1")
    out = ["--out", str(tmp_path)]
    asked = replaced(monkeypatch, iter([0, None]))
    now = time.monotonic()
    assert bench_h100.main(["inference", "--minutes", "0.5", *out]) == 75
    assert [line[3:5] for line, *_ in asked] == [["bench", "forward"], ["bench", "vae"]]
    assert all(29 < end - now < 40 for _, _, end, _ in asked)
    asked = replaced(monkeypatch, itertools.repeat(0))
    assert bench_h100.main(["training", *out, "--keep-rows"]) == 0 and len(asked) == 3
    line, env, _, file = asked[-1]
    assert file == tmp_path.resolve() / "train_wan_h200.json" and str(file) in line
    assert "--keep-rows" in line and "--keep-rows" not in commands("training")[0]
    assert env["JAX_COMPILATION_CACHE_DIR"] == str(ROOT / ".cache/bench_h100/programs")
    assert env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0" and "PATH" in env
    # What README tells users to export, but for one GPU, and each flag once: the user's own wins.
    assert env["XLA_FLAGS"] == f"{bench_h100.ALONE} --xla_gpu=own --xla_other=1"
    assert bench_h100.main(["training", "--device-less", *out]) == 0
    line, env, *_ = asked[-1]
    assert env["XLA_FLAGS"] == "--xla_gpu=own --xla_other=1"
    assert str(tmp_path.resolve() / "train_wan_h100_compiled.json") in line
    replaced(monkeypatch, itertools.repeat(1))
    assert bench_h100.main(["training", *out]) == 1


def test_kernels_that_are_wrong_are_left_out(monkeypatch, flags, tmp_path):
    asked = replaced(monkeypatch, itertools.repeat(0))
    assert bench_h100.main(["first", "--out", str(tmp_path), "--without", "hopper", "cudnn_fp8",
                            "--no-profile"]) == 0
    backends = []
    for line, *_ in asked:
        args, _ = parse_command("bench", line[4:])
        backends.append((args.what, args.backends))
        assert not args.profile
    assert backends[0] == ("attention", ["cudnn", "tokamax", "torch"])
    assert ("train", ["cudnn"]) in backends and ("forward", ["tokamax"]) in backends
    assert not any(set(names or []) & {"hopper", "cudnn_fp8"} for _, names in backends)


@pytest.mark.parametrize(("excluded", "left"), [
    (["hopper"], "cudnn"), (["hopper", "cudnn"], "pallas"), (["hopper", "cudnn", "pallas"], "oracle")])
def test_what_is_left_out_comes_in_for_nothing(excluded, left):
    found = bench_h100.without(["forward", "--backends", "hopper", "--no-peers"], excluded)
    assert found == ["forward", "--backends", left, "--no-peers"]


def test_a_row_that_the_clock_cut_off_is_missing_and_did_not_fail(monkeypatch, flags, tmp_path):
    """One that hung before stands as failed, and is tried last."""
    file = tmp_path / "forward_8b_h200.json"
    hung, made = {"error": rows.CUT_OFF}, {"median": 1.0}
    file.write_text(json.dumps({"rows": {"hung": hung, "made": made}}))

    def run(line, env, end, patience, file):
        found = json.loads(file.read_text())
        found["rows"]["under way"] = hung
        file.write_text(json.dumps(found))

    monkeypatch.setattr(bench_h100, "run", run)
    assert bench_h100.main(["inference", "--out", str(tmp_path)]) == 75
    assert json.loads(file.read_text())["rows"] == {"hung": hung, "made": made}


def runs(path):
    """Whether a command line in /proc is the one that should have ended."""
    try:
        return path.read_bytes() == b"sleep\0" b"77\0"
    except OSError:  # it ended just now
        return False


def test_a_process_that_hangs_is_ended(tmp_path, capsys):
    """By its silence, with the processes that it started; one that keeps rows may go on."""
    file, env = tmp_path / "rows.json", dict(os.environ)

    def run(program, seconds=60.0, patience=1.0):
        return bench_h100.run([sys.executable, "-c", program], env, time.monotonic() + seconds,
                              patience, file)

    sleeps = f"import subprocess; open({str(file)!r}, 'w').close(); subprocess.run(['sleep', '77'])"
    assert run(sleeps) == bench_h100.SILENT and "nothing for 1 s" in capsys.readouterr().out
    assert run(sleeps, seconds=0.5) is None
    for _ in range(100):  # it is told at once, and the system takes a moment
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if runs(path)]
        if not left:
            break
        time.sleep(0.1)
    assert not left
    keeps = (f"import pathlib, time\nfor i in range(4):\n pathlib.Path({str(file)!r}).write_text('')\n"
             " time.sleep(0.5)")
    assert run(keeps, patience=1.5) == 0
    assert run("raise SystemExit(7)") == 7


def test_files_are_named_by_the_gpu(monkeypatch):
    for said, name in (("NVIDIA H100 80GB HBM3\n", "h100"), ("NVIDIA H200\nNVIDIA H200\n", "h200"),
                       ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb")):
        monkeypatch.setattr(subprocess, "run", lambda *_, said=said, **__:
                            subprocess.CompletedProcess("", 0, stdout=said))
        assert bench_h100.gpu_name() == name
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    with pytest.raises(SystemExit, match="names no GPU here; --device-less"):
        bench_h100.gpu_name()


def test_a_row_that_breaks_its_process_holds_up_no_other(monkeypatch, flags, tmp_path):
    """The command goes on in another process; four of them at most."""
    asked = replaced(monkeypatch, iter([75, -6, 0, 1, *[75] * 4, 0]))
    assert bench_h100.main(["inference", "--out", str(tmp_path)]) == 1
    assert [line[4] for line, *_ in asked] == (
        ["forward"] * 3 + ["vae"] + ["pipeline"] * 4 + ["forward"])


def test_each_training_step_has_a_process_of_its_own(monkeypatch, flags, tmp_path):
    """As many processes as there are rows; one that breaks is no row of them."""
    assert all(c[c.index("--rows") + 1] == "1" for c in commands("training"))
    assert not any("--rows" in c for c in commands("training", device_less=True))
    assert any("--seconds" in c for c in commands("attention"))
    assert not any("--seconds" in c for c in commands("attention", device_less=True))
    asked = replaced(monkeypatch, iter([*[bench_h100.MORE] * 9, -9, 0, 75, bench_h100.MORE, 0, 0]))
    assert bench_h100.main(["training", "--out", str(tmp_path)]) == 0 and len(asked) == 15


PERFORMANCE = ROOT / "docs/results/performance"


def committed(pattern: str):
    found = [(path.name, json.loads(path.read_text()))
             for path in sorted(PERFORMANCE.glob(pattern)) if ".before" not in path.name]
    assert found
    return found


def test_committed_rows_say_how_they_came_about():
    for name, content in committed("*.json"):
        assert content["device"] and content["cpu"] and content["versions"]["jax"], name
        assert "h100" not in name or {"jax-cuda12-plugin", "jax-cuda13-plugin"} & set(
            content["versions"]), name
        for row in content["rows"].values():
            command = shlex.split(row["command"])
            assert command[:2] in (["apt-jax", "bench"], ["python", "launch/ask_cudnn.py"],
                                   ["python", "launch/check_kernels.py"]), name
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
