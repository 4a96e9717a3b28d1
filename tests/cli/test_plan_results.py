"""apt-jax plan around the compiler: where its results go. What is compiled is made up."""

import json

import pytest

from apt_jax.cli.main import main
from apt_jax.plan import run
from apt_jax.plan.chips import GIB, parse_topology
from apt_jax.plan.flops import Flops
from apt_jax.plan.measure import Measurement
from apt_jax.plan.run import Plan

PLAN = ["plan", "--config", "configs/demo_image.py", "--topology", "h100:1x2", "--no-remedy"]


def lacking(options, device, tell):
    """A compiler that lacks one option."""
    tell("left out xla_x")
    return options


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The plans that were asked for; none is compiled, and the environment stays as it is."""
    asked = []

    def plan(config, topology, **settings):
        asked.append((dict(config.mesh), config.model.remat))
        step = Measurement("D step", 8, 2, {}, GIB, 0, 0, 0, 0, Flops(1e12), Flops(1e12), 0.1,
                           float(len(asked)), 0.0, (), (), (), "", "pallas", {"xla_a": 1})
        return Plan(parse_topology("h100:1x2"), {"fsdp": 2}, 8, 64, {"generator": 1}, (step,))

    monkeypatch.setattr(run, "plan", plan)
    monkeypatch.setattr("apt_jax.plan.devices.prepare_environment", lambda unrun=False: None)
    monkeypatch.setattr("apt_jax.plan.devices.describe", lambda topology: [None])
    monkeypatch.setattr("apt_jax.parallel.flags.options.known_options", lacking)
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize("more", [[], ["--sweep"]])
@pytest.mark.parametrize("name", ["file/plan.json", "folder"])
def test_a_file_that_cannot_be_written_is_found_before_anything_is_compiled(
        name, more, tmp_path, compiled, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert main([*PLAN, *more, "--json", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.strip()
    assert "cannot write" in said and "may write to" in said and "\n" not in said
    assert not compiled


def test_so_is_a_folder_for_programs(tmp_path, compiled, capsys):
    (tmp_path / "file").write_text("")
    assert main([*PLAN, "--hlo", str(tmp_path / "file/hlo")]) == 2
    assert "give --hlo a folder" in capsys.readouterr().err and not compiled


def test_nothing_is_left_where_a_plan_ends_in_an_error(tmp_path, monkeypatch):
    def refuse(*args, **settings):
        from apt_jax.errors import UserError

        raise UserError("no; yes")

    monkeypatch.setattr(run, "plan", refuse)
    out, old = tmp_path / "new/plan.json", tmp_path / "old.json"
    old.write_text("[]")
    assert main([*PLAN, "--json", str(out)]) == 2 and not out.exists()  # launch/plans.py looks
    assert main([*PLAN, "--json", str(old)]) == 2 and old.read_text() == "[]"


def test_a_plan_is_written_with_its_kernel_and_all_flags(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new/plan.json"
    assert main([*PLAN, "--json", str(out)]) == 0
    value = json.loads(out.read_text())
    assert value["attention"] == "pallas" and value["flags"] == {"xla_a": 1}
    assert "environment" not in value and "attention: pallas" in capsys.readouterr().out
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2")
    assert main([*PLAN, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["environment"] == {"XLA_FLAGS": "--xla_b=2"}


def test_a_sweep_that_is_cut_off_leaves_the_rows_until_then(tmp_path, compiled, monkeypatch, capsys):
    out, plan = tmp_path / "sweep.json", run.plan
    sweep = [*PLAN, "--sweep", "--remats", "full", "none", "--json", str(out)]
    assert main(sweep) == 0
    assert capsys.readouterr().err.count("left out xla_x") == 1
    rows = json.loads(out.read_text())
    whole = len(compiled)
    assert len(rows) == whole > 4 and rows[0]["step_seconds"] == 1.0  # by time

    def cut_off(*args, **settings):
        if len(compiled) == whole + 3:
            assert len(json.loads(out.read_text())) == 3
            raise KeyboardInterrupt
        return plan(*args, **settings)

    monkeypatch.setattr(run, "plan", cut_off)
    assert main(sweep) not in (0, 1)
    rows = json.loads(out.read_text())
    assert len(rows) == 3 and all(row["programs"] and row["remat"] for row in rows)
