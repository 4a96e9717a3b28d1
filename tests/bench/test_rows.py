"""What a row of a bench says, when it is made again, and what is a failure."""

from __future__ import annotations

import json
import shlex

import jax
import numpy as np
import pytest
from small_configs import small

from apt_jax.bench import attention, case, report, rows, run
from apt_jax.bench.cases import AttentionCase
from apt_jax.bench.report import Results, config_digest
from apt_jax.cli import main as cli
from apt_jax.errors import UserError


# -- when a row is made again ----------------------------------------------------------------------


def test_a_row_of_another_config_is_measured_again(tmp_path):
    """The file of a config was edited: the same command, the same name, another network."""
    before, after = (config_digest(small("demo_image", f"--config.model.remat={remat}"))
                     for remat in ("full", "attention"))
    assert before != after == config_digest(small("demo_image", "--config.model.remat=attention"))
    results = Results(tmp_path / "rows.json", "cpu", ["apt-jax", "bench", "two words"])
    results.add("a", {"median": 1.0}, before)
    assert results.has("a", before) and not results.has("a", after) and "a" not in results
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"].values()
    assert shlex.split(row["command"]) == ["apt-jax", "bench", "two words"]
    assert row["config"] == before


def test_an_edited_config_reaches_the_rows_of_a_bench(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(run, "time_case", lambda made, *_: timed.append(made.config) or {
        "median": 1.0, "low": 1.0, "high": 1.0, "backend": "oracle"})
    for shift in ("1", "1", "2"):
        plan = run.Plan("forward", lambda _, s=shift: small(
            "demo_image", f"--config.objective.flow.shift={s}"), jax.devices()[:1], peers=False)
        run.time_all(plan, "cpu", Results(tmp_path / "rows.json", "cpu"), lambda _: None)
    assert len(timed) == 2 and timed[0] != timed[1]


# -- failures --------------------------------------------------------------------------------------


def test_what_fails_is_said_kept_apart_and_tried_again(tmp_path, monkeypatch, capsys):
    reasons = [RuntimeError("out of\nmemory"), UserError("not here"), None, None]
    made = case.Case("row", "forward", "oracle", None, ())
    monkeypatch.setattr(run, "cases", lambda plan: [made])

    def time_case(*_):
        reason = reasons.pop(0)
        if reason:
            raise reason
        return {"median": 1.0, "low": 1.0, "high": 1.0, "backend": "oracle"}

    monkeypatch.setattr(run, "time_case", time_case)
    plan = run.Plan("forward", lambda _: None, [None], peers=False)
    path, lines = tmp_path / "rows.json", []
    assert run.time_all(plan, "cpu", Results(path, "cpu"), lines.append) == 1
    assert "FAILED: RuntimeError: out of memory" in lines[0]
    assert "Traceback" in capsys.readouterr().err
    assert Results(path, "cpu").rows["row"]["error"] and "row" not in Results(path, "cpu")
    assert run.time_all(plan, "cpu", Results(path, "cpu"), lines.append) == 0
    assert "left out: not here" in lines[1] and "row" in Results(path, "cpu")
    assert run.time_all(plan, "cpu", Results(path, "cpu"), lines.append) == 0 and len(lines) == 2


def test_what_broke_its_process_or_the_device_comes_last(tmp_path, monkeypatch):
    works, order, said = [True], [], []

    def row(name, reason=None):
        def make():
            order.append(name)
            if reason is KeyboardInterrupt:  # the process ends, as by a signal
                raise reason
            works[0] = not reason
            return {"error": reason} if reason else {"median": 1.0}
        return name, "", make

    def begin(*todo):
        return rows.make_rows(todo, Results(path, "cpu"), lambda name, made: said.append(name))

    path = tmp_path / "rows.json"
    monkeypatch.setattr(rows, "device_works", lambda: works[0])
    with pytest.raises(KeyboardInterrupt):
        begin(row("a"), row("b", KeyboardInterrupt), row("c"))
    assert Results(path, "cpu").rows["b"]["error"] == rows.CUT_OFF
    with pytest.raises(rows.DeviceLost, match="after c"):
        begin(row("a"), row("b"), row("c", "illegal access"), row("d"))
    works[0] = True
    assert begin(row("a"), row("b"), row("c", ""), row("d")) == 0
    assert order == ["a", "b", "c", "d", "b", "c"] and said == ["a", "c", "d", "b", "c"]
    monkeypatch.undo()
    assert rows.device_works()


def test_what_a_row_has_before_the_rest_ends_or_fails_is_kept(tmp_path, monkeypatch):
    """A trace that ends the process, and parts that do not fit the device."""
    path, works, told = tmp_path / "rows.json", [True], []
    monkeypatch.setattr(rows, "device_works", lambda: works[0])

    def begin(make):
        return rows.make_rows([("a", "", make)], Results(path, "cpu"), lambda *row: told.append(row))

    def ends():
        rows.keep({"median": 1.0})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(ends)
    row = Results(path, "cpu").rows["a"]
    assert (row["median"], row["incomplete"]) == (1.0, rows.CUT_OFF)
    assert begin(lambda: {"median": 2.0}) == 0 and not told  # it is there
    path.unlink()

    def fails():
        rows.keep({"median": 3.0})
        rows.keep({"stages": 4.0})
        return {"error": "too large"}

    assert begin(fails) == 0
    row = Results(path, "cpu").rows["a"]
    assert "error" not in row and row["incomplete"] == "too large"
    assert (row["median"], row["stages"]) == (3.0, 4.0) and told[0][1]["incomplete"]
    path.unlink()
    works[0] = False
    with pytest.raises(rows.DeviceLost):
        begin(fails)
    rows.keep({"median": 5.0})  # outside of a row there is nobody to take it


def test_as_many_rows_as_are_asked_for(tmp_path):
    """A process each; what was left out is none, and what failed comes in the last."""
    path, left = tmp_path / "rows.json", {"b": "skipped", "c": "error"}

    def begin():
        tried: list[str] = []

        def row(name):
            return name, "", lambda: tried.append(name) or (
                {left[name]: "why"} if name in left else {"median": 1.0})
        try:
            end = rows.make_rows(map(row, "abcd"), Results(path, "cpu"), lambda *_: None, most=1)
        except rows.Enough:
            end = None
        return "".join(tried), end

    assert [begin() for _ in range(3)] == [("a", None), ("bc", None), ("d", None)]
    assert begin() == ("c", 1)
    del left["c"]
    assert begin() == ("c", 0) and begin() == ("", 0)


def test_a_device_that_is_lost_is_a_status_of_its_own(monkeypatch, capsys):
    from apt_jax.cli import bench

    def lost():
        raise rows.DeviceLost("gone")

    def enough():
        raise rows.Enough

    assert [bench._status(made) for made in (lambda: 0, lambda: 2, lost, enough)] == [0, 1, 75, 76]
    assert "gone; the same command goes on" in capsys.readouterr().out


def test_a_failure_is_the_commands_status(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "measure", lambda *a, **k: 1 / 0)
    out = tmp_path / "rows.json"
    monkeypatch.setattr("apt_jax.bench.cases.CASES", {"t": AttentionCase("t", 4, 4, 1, 4)})
    command = ["bench", "attention", "--backends", "oracle", "cudnn", "--json", str(out)]
    assert cli.main(command) == 1
    kept = json.loads(out.read_text())["rows"]
    assert "ZeroDivisionError" in kept["t/forward/oracle"]["error"]
    assert "NVIDIA GPU" in kept["t/forward/cudnn"]["skipped"]


def test_an_absent_kernel_is_a_row_that_fails(monkeypatch):
    """Another kernel of the same command compiles."""
    def refuse(x):
        raise UserError("it is not installed")

    x = jax.ShapeDtypeStruct((4,), np.float32)
    made = [case.compile_case(case.Case(name, "forward", name, jax.jit(f), (x,),
                                        kernels={"k": n}), jax.devices()[0], "cpu")
            for name, f, n in (("a", refuse, 1), ("b", lambda x: x + 1, 0))]
    assert [row.passes for row in made] == [False, True]
    assert made[0].error == "it is not installed" and made[0].wanted == {"k": 1}


def test_rows_of_other_sources_count_where_they_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    Results(file, "cpu").add("a", {"median": 1.0}, "digest")
    monkeypatch.setattr(report, "_own_revision", lambda: "another")
    assert not Results(file, "cpu").has("a", "digest")
    kept = Results(file, "cpu", keep=True)
    assert kept.has("a", "digest") and not kept.has("a", "other") and not kept.has("b")
    rows.forget(file, {"a"})
    assert not Results(file, "cpu", keep=True).rows


@pytest.mark.parametrize("ends", [KeyboardInterrupt, "illegal access"])
def test_an_older_time_stands_until_there_is_a_new_one(tmp_path, monkeypatch, ends):
    file = tmp_path / "rows.json"
    Results(file, "cpu").add("a", {"median": 1.0})
    monkeypatch.setattr(report, "_own_revision", lambda: "another")

    def fails():
        if isinstance(ends, str):
            return {"error": ends}
        raise ends

    def begin(make):
        return rows.make_rows([("a", "", make)], Results(file, "cpu"), lambda *_: None)

    for _ in range(2):  # also where it fails again
        if isinstance(ends, str):
            assert begin(fails) == 1
        else:
            with pytest.raises(KeyboardInterrupt):
                begin(fails)
        kept = Results(file, "cpu")
        assert kept.failed("a") and kept.rows["a"]["before"]["median"] == 1.0
    rows.forget(file, {"a"})
    assert Results(file, "cpu").rows["a"]["median"] == 1.0 and not Results(file, "cpu").has("a")
    assert begin(lambda: {"median": 2.0}) == 0
    assert Results(file, "cpu").has("a") and "before" not in Results(file, "cpu").rows["a"]


def test_a_driver_s_patch_is_no_other_driver():
    def head(driver):
        return {"device": "NVIDIA H100", "versions": {}, "nvidia": {"driver": driver}, "rows": {}}

    assert report.changes(head("580.159.03"), head("580.159.04")) == []
    assert report.changes(head("570.1"), head("580.159.04")) == [
        "driver 570.1, now 580.159.04"]
