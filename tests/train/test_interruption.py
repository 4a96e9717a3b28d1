"""Runs in their own process, killed by SIGKILL and stopped by SIGTERM, against undisturbed ones."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_tiny import get_config
from test_loop import assert_same, final_state, logged, losses
from tiny import random_weights

from apt_jax.train.loop import train

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def undisturbed(weights, tmp_path_factory):
    """(folder, final state) of the run that nothing happens to."""
    folder, config = tmp_path_factory.mktemp("undisturbed"), get_config(weights)
    assert train(config, folder, quiet=True)["step"] == 12
    return folder, final_state(folder, config)


@pytest.fixture
def start(weights, tmp_path):
    """Starts the command line in a process of its own; none outlives the test."""
    begun = []

    def start(*overrides):
        command = [sys.executable, "-m", "apt_jax", "train", "--config",
                   f"{HERE}/run_tiny.py:{weights}", "--workdir", str(tmp_path), "--quiet",
                   *overrides]
        begun.append(subprocess.Popen(command, cwd=HERE.parents[1], env=dict(os.environ),
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for_step(process, workdir, step, seconds=900):
    """Returns once metrics.jsonl tells of `step`."""
    end, path = time.monotonic() + seconds, workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.01)


def test_a_killed_run_goes_on_to_the_same_bits(start, weights, undisturbed, tmp_path):
    """SIGKILL at a random moment, then the same command again."""
    step, pause = random.randint(1, 9), random.uniform(0, 0.5)
    print(f"killed {pause} s after step {step}")  # shown if the test fails
    process = start()
    wait_for_step(process, tmp_path, step)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start()
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert_same(final_state(tmp_path, get_config(weights)), undisturbed[1])
    assert losses(tmp_path) == losses(undisturbed[0])
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 13))
    for step in (4, 8, 12):
        name = f"samples/step_{step:06d}.png"
        assert (tmp_path / name).read_bytes() == (undisturbed[0] / name).read_bytes()


def test_sigterm_saves_the_step_and_leaves_cleanly(start, weights, tmp_path):
    process = start("--config.train.steps=100000", "--config.train.sample_every=0",
                    "--config.train.checkpoint_every=100000")
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    last = logged(tmp_path)[-1]["step"]
    assert f"SIGTERM: saved step {last} of 100000" in said
    assert said.count("captions longer than data.max_text_tokens") == 1, said
    config = get_config(weights)
    assert final_state(tmp_path, config)["step"] == last
    config.train.steps = last + 1
    assert train(config, tmp_path, quiet=True)["step"] == last + 1
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, last + 2))
