"""Asking cuDNN for its kernels without a GPU: the question here, the answer under make test-plan."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jax.bench.cases import CASES

SCRIPT = Path(__file__).parents[2] / "launch" / "ask_cudnn.py"
spec = importlib.util.spec_from_file_location("ask_cudnn", SCRIPT)
ask_cudnn = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ask_cudnn)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def test_without_nvidias_wheels_it_says_what_to_install(monkeypatch, capsys):
    def none():
        raise ImportError("No module named 'nvidia'")

    monkeypatch.delenv(ask_cudnn.ASKING, raising=False)
    monkeypatch.setattr(ask_cudnn, "wheels", none)
    assert ask_cudnn.main([]) == 2
    said = capsys.readouterr().err
    assert "pip install 'apt_jax[plan]'" in said and said.count("\n") == 1


def test_a_refusal_for_another_reason_is_no_control(monkeypatch):
    """Two graphs must be refused for their heads; a stub that lacks a function refuses everything."""
    class Answers:
        cudnn = type("", (), {"backend_version_string": staticmethod(lambda: "9")})
        forward = backward = eight_bits = None

        def build(self, make, q, k):
            asked.append(q)
            if q[3] in ask_cudnn.REFUSED.values():
                return {"built": False, "reason": reason}
            return {"built": True, "plan": "eng9"}

    class Rows:
        def add(self, name, row):
            rows[name] = row

    monkeypatch.setattr(ask_cudnn, "Graphs", Answers)
    for reason, good in (("hidden_dim should be smaller", True),  # noqa: B007 - Answers reads it
                         ("undefined symbol", False)):
        asked, rows = [], {}
        assert ask_cudnn.ask(Rows()) == good
        assert len(rows) == 3 * len(ask_cudnn.CASES) + 2 and set(ask_cudnn.CASES) <= set(CASES)
    assert (1, 24, 47_104, 128) in asked  # eight bits in whole tiles


@pytest.mark.plan
@pytest.mark.skipif(not (has("cudnn") and has("jax_cuda12_plugin") and shutil.which("cc")),
                    reason="needs nvidia-cudnn-frontend, jax's CUDA plugin and a C compiler")
def test_cudnn_builds_what_the_benches_name(tmp_path):
    out = tmp_path / "rows.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", str(out)], env=dict(os.environ),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["built"] for row in rows.values()] == [True] * 9 + [False] * 2
