"""What the loop tells while it runs, with an update that computes nothing."""

import hashlib
import json
import os
import signal
import threading
import time

import pytest
from tiny import emoji_config

from apt_jax.train import loop
from apt_jax.train.loop import train


@pytest.fixture
def updates(monkeypatch):
    """An update that leaves the state as it is; its metrics are those of the list, in turn, and
    then the last."""
    given = []

    def build(*_):
        def update(state, _frozen, _batch):
            return state, dict(given.pop(0) if len(given) > 1 else given[0])

        return update

    monkeypatch.setattr(loop, "build_update", build)
    return given


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_collapse_is_seen_whatever_the_penalty(updates, tmp_path, capsys):
    """r1_weight * r1 keeps the loss up long after D has won everywhere."""
    updates.append({"discriminator/loss": 5.0, "discriminator/d_gan": 0.01,
                    "discriminator/r1": 0.05})
    train(emoji_config(train__steps=50, train__checkpoint_every=50), tmp_path / "won", quiet=True)
    assert "step 50: the discriminator's loss without penalties" in capsys.readouterr().err
    updates[:] = [{"discriminator/loss": 0.01, "discriminator/d_gan": 0.7}]
    train(emoji_config(train__steps=50, train__checkpoint_every=50), tmp_path / "not", quiet=True)
    assert "discriminator's loss" not in capsys.readouterr().err


def test_what_came_after_the_last_line_is_logged_before_a_signal_ends_the_run(
        updates, tmp_path, monkeypatch):
    class AtTheThird(loop.Preemption):
        def asked(self, step):
            return signal.SIGTERM.name if step == 3 else ""

    monkeypatch.setattr(loop, "Preemption", AtTheThird)
    updates.extend({"loss": float(n)} for n in range(1, 5))
    config = emoji_config(train__steps=9, train__log_every=2)
    summary = train(config, tmp_path, quiet=True)
    assert (summary["status"], summary["step"]) == ("preempted", 3)
    assert [(line["step"], line["loss"]) for line in logged(tmp_path)] == [(2, 1.5), (3, 3.0)]
    assert summary["metrics"]["loss"] == 3.0


def test_a_signal_while_the_first_step_compiles_ends_the_process_at_once(
        tmp_path, monkeypatch, capsys):
    """Nothing is lost; the scheduler's patience may be shorter than the compiler's work."""
    class Compiled(Exception):
        pass

    def build(*_):
        def update(*_):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # no Python code runs, as in XLA
            raise Compiled(time.monotonic())

        return update

    monkeypatch.setattr(loop, "build_update", build)
    left = []
    with pytest.raises(Compiled) as compiled:
        train(emoji_config(), tmp_path, quiet=True, leave=lambda: left.append(time.monotonic()))
    assert len(left) == 1 and left[0] < compiled.value.args[0]
    assert "SIGTERM: left before the first update" in capsys.readouterr().err
    with pytest.raises(Compiled):  # where nobody says how to leave, it is noted
        train(emoji_config(), tmp_path, quiet=True)


def test_after_the_first_update_a_signal_waits_for_the_step(updates, tmp_path, monkeypatch):
    updates.append({"loss": 1.0})
    left = []

    class Signalled(loop.Preemption):
        def updates(self):
            super().updates()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "Preemption", Signalled)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the second, as the run is left
    try:
        summary = train(emoji_config(), tmp_path, quiet=True, leave=lambda: left.append(1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (summary["status"], summary["step"], left) == ("preempted", 1, [])


def test_a_run_of_images_and_clips_shows_both(updates, tmp_path):
    updates.append({"loss": 1.0})
    train(emoji_config(data__frames=(1, 2), train__steps=1, train__sample_every=1,
                       sample__steps=1), tmp_path, quiet=True)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_000001.png", "step_000001.webp"]
