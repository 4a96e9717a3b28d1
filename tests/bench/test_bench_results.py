"""The files of rows: whose a row is, what makes all of them anew, what is no such file."""

import json
import os
from types import SimpleNamespace

import jax
import pytest

from apt_jax.bench import report
from apt_jax.bench.report import Results
from apt_jax.cli import main as cli


def test_results_go_on_where_they_stopped_but_not_on_other_hardware(tmp_path):
    path = tmp_path / "deep" / "rows.json"
    first = Results(path, "H100")
    first.add("a/forward", {"median": 1.0})
    written = json.loads(path.read_text())
    assert written["device"] == "H100" and written["versions"]["jax"] == jax.__version__
    assert "a/forward" in Results(path, "H100") and "b" not in Results(path, "H100")
    assert "a/forward" not in Results(path, "H200")


def test_a_row_of_other_flags_is_measured_again(tmp_path, monkeypatch):
    """The same command under other XLA_FLAGS; libraries of another version are other hardware."""
    path = tmp_path / "rows.json"
    monkeypatch.setenv("XLA_FLAGS", " --a=1   --b=2 ")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.setattr(report, "nvidia", lambda: {"driver": "570"})
    Results(path, "H100").add("a", {"median": 1.0})
    written = json.loads(path.read_text())
    assert written["flags"] == written["rows"]["a"]["flags"] == "XLA_FLAGS=--a=1 --b=2"
    assert written["nvidia"] == {"driver": "570"} and "a" in Results(path, "H100")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--c")
    assert report.flags() == "XLA_FLAGS=--a=1 --b=2 LIBTPU_INIT_ARGS=--c"
    other = Results(path, "H100")
    assert "a" not in other and "a" in other.rows
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    assert "a" not in Results(path, "H100") and report.flags() == ""
    monkeypatch.setattr(report, "nvidia", lambda: {"driver": "580"})
    assert Results(path, "H100").rows == {}


def test_what_makes_all_rows_anew_is_said_and_the_old_file_is_kept(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    for number, driver in enumerate(("570", "580", "590")):
        monkeypatch.setattr(report, "nvidia", lambda: {"driver": driver})  # noqa: B023
        results = Results(path, "H100")
        said = capsys.readouterr().out
        if number:
            old = json.loads(path.read_text())  # until there is a new row
            assert said.startswith(f"rows.json: driver {old['nvidia']['driver']}, now {driver}: all ")
            assert said.count("\n") == 1 and old["rows"]["a"]["median"] == number - 1
        results.add("a", {"median": float(number)})
        results.add("b", {"median": 9.0})
    kept = {name: json.loads((tmp_path / name).read_text())["rows"]["a"]["median"] for name in
            ("rows.json", "rows.before.json", "rows.before2.json")}
    assert list(kept.values()) == [2.0, 0.0, 1.0] and len(list(tmp_path.iterdir())) == 3


def test_a_row_belongs_to_the_packages_that_made_it(tmp_path, monkeypatch, capsys):
    """Wheels that are carried later: what they make is measured again, and nothing else."""
    path, versions = tmp_path / "rows.json", {"jax": "1", "torch": "2.5", "libtpu": "1"}
    monkeypatch.setattr(report, "versions_of", lambda names: {
        name: versions[name] for name in names if name in versions})
    monkeypatch.setattr(report, "nvidia", lambda: {"driver": "570"} | {
        name: version for name, version in versions.items() if name.startswith("nvidia-")})
    names = ["c/forward/bfloat16/pallas", "c/forward/torch model.depth=1",
             "c/pipeline/fp8/tokamax/chunk 1", "16k/forward/tokamax_choice", "c/D step/dtype/auto"]

    def current():
        results = Results(path, "NVIDIA H100")
        return [name in results for name in names]

    first = Results(path, "NVIDIA H100")
    for name in names:
        first.add(name, {"median": 1.0})
    assert current() == [True] * 5
    assert first.rows[names[1]]["packages"] == {"torch": "2.5", "diffusers": None}
    versions |= {"diffusers": "0.40", "libtpu": "2", "nvidia-cusparselt-cu12": "1"}
    assert current() == [True, False, True, True, True]
    versions["tokamax"] = "0.0.17"
    assert current() == [True, False, False, False, False]
    assert capsys.readouterr().out == ""
    # A file of before, whose rows say nothing of packages: those of its head.
    kept = json.loads(path.read_text())
    for row in kept["rows"].values():
        row.pop("packages", None)
    path.write_text(json.dumps(kept))
    assert current() == [True, False, False, False, False]
    versions["jax"] = "2"
    assert current() == [False] * 5 and "jax 1, now 2" in capsys.readouterr().out


@pytest.mark.parametrize("row, kept", [
    ({"median": 1.0}, False), ({"torch_threads": 1}, False), ({"fd": 1.0}, True)])
def test_times_belong_to_the_processor_of_a_cpu(tmp_path, monkeypatch, row, kept):
    """Every CPU calls itself "cpu". What eight bits cost in quality is no time."""
    path = tmp_path / "rows.json"
    Results(path, "cpu").add("a", row)
    assert "a" in Results(path, "cpu")
    for name, other in (("processor", lambda: "another"), ("os", SimpleNamespace(
            sched_getaffinity=lambda _: range(999), getloadavg=os.getloadavg, environ=os.environ))):
        with monkeypatch.context() as patched:
            patched.setattr(report, name, other)
            assert ("a" in Results(path, "cpu")) == kept
    if not kept:
        old = json.loads(path.read_text())
        path.write_text(json.dumps(old | {"device": "NVIDIA H100"}))
        monkeypatch.setattr(report, "processor", lambda: "another")
        assert "a" in Results(path, "NVIDIA H100")  # a GPU's are its own


def test_the_driver_and_the_libraries_are_asked_for(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.10; echo 570.86.10\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert report.nvidia()["driver"] == "570.86.10"
    tool.write_text("#!/bin/sh\necho no device; exit 9\n")
    assert "driver" not in report.nvidia()
    monkeypatch.setattr(report.importlib.metadata, "distributions", lambda: [
        SimpleNamespace(metadata={"Name": name}) for name in ("nvidia-cudnn-cu12", "jax", None)])
    monkeypatch.setattr(report, "versions_of", lambda names: dict.fromkeys(names, "9.8"))
    assert report.nvidia()["nvidia-cudnn-cu12"] == "9.8" and "jax" not in report.nvidia()


@pytest.mark.parametrize("content", [
    b"not json", b"", b"{}", b"[]", b"\x00\xff\xfe", b'{"rows": []}', b'{"rows": {"a": 1}}',
    b'{"rows": {}, "versions": []}'])
@pytest.mark.parametrize("what", ["attention", "fp8"])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path, capsys, what, content):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    assert cli.main(["bench", what, "--json", str(path)]) == 2
    err = capsys.readouterr().err
    assert "no file of a bench's rows, and it stays as it is" in err and err.count("\n") == 1
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
