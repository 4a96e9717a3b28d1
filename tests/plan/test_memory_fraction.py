"""The launch files give jax the memory that the plan counts on."""

import re
import runpy
import types
from pathlib import Path

import pytest
import yaml

from apt_jax.plan.run import RESERVE

LAUNCH = Path(__file__).parents[2] / "launch"
NAME = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def test_slurm():
    (found,) = re.findall(rf"^export {NAME}=\$\{{{NAME}:-([\d.]+)\}}$",
                          (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert float(found) == pytest.approx(1 - RESERVE)


def test_the_jobset_for_gpus():
    def environments(node):
        if isinstance(node, dict):
            yield from ([node["env"]] if "env" in node else [])
            for value in node.values():
                yield from environments(value)
        elif isinstance(node, list):
            for value in node:
                yield from environments(value)

    (env,) = environments(yaml.safe_load((LAUNCH / "jobset_gpu.yaml").read_text()))
    (found,) = [row["value"] for row in env if row["name"] == NAME]
    assert float(found) == pytest.approx(1 - RESERVE)


def test_processes_of_one_machine(monkeypatch):
    """Each has its own GPUs; a setting of the user's wins."""
    environment = runpy.run_path(str(LAUNCH / "local.py"))["environment"]

    def found(gpus=0, cpu=False):
        args = types.SimpleNamespace(processes=2, gpus=gpus, cpu=cpu, devices=1)
        return environment(args, 0, 1, "").get(NAME)

    monkeypatch.delenv(NAME, raising=False)
    assert float(found(gpus=2)) == pytest.approx(1 - RESERVE)
    assert found(cpu=True) is None
    monkeypatch.setenv(NAME, "0.3")
    assert found(gpus=2) == "0.3"
