"""metrics.jsonl is never doubled or torn; progress lines say rate and time left."""

import io
import json

import pytest

from apt_jax.train import logs
from apt_jax.train.logs import MetricLog, Progress, truncate_lines


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    truncate_lines(path, 4)
    assert steps_in(path) == [2, 4]
    log = MetricLog(tmp_path, 4)
    log.write(6, {"loss": 0.5})
    log.close()
    assert steps_in(path) == [2, 4, 6]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_damaged_byte_costs_its_line_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2}\n{"step": 4, "\xff\xfe": 1\n{"step": 6, "at": "\xe2\x80\xa8"}\n')
    truncate_lines(path, 8)
    assert [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] == [2, 6]


def test_a_process_that_does_not_write_leaves_no_files(tmp_path):
    log = MetricLog(tmp_path, 0, writes=False)
    log.write(1, {"loss": 0.5})
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(clock):
    stream = io.StringIO()
    progress = Progress(4, 1, "demo", stream=stream, every_seconds=0.0)
    for step, note in ((2, None), (3, "loss 0.5"), (4, None)):
        clock[0] += 2
        progress.update(step, note)
    progress.say("hello")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "demo: step 2/4", "demo: step 3/4, 2.00 s/step, 0:02 left, loss 0.5",
        "demo: step 4/4, 2.00 s/step, 0:00 left, loss 0.5", "hello"]


def test_compiling_is_said_and_does_not_count(clock):
    """315 s of it, as a step's time, were 2936:58 left of 3,600 steps."""
    stream = io.StringIO()
    progress = Progress(3600, 0, "demo", stream=stream)
    progress.compiles("the first step")
    for seconds, step in ((315, 1), (10, 11), (315, 12), (20, 32)):
        if step == 12:
            progress.compiles("the step of clips")
        clock[0] += seconds
        progress.update(step)
    first, *lines = stream.getvalue().splitlines()
    assert first == "demo: compiling the first step"
    assert lines == ["demo: step 1/3600", "demo: step 11/3600, 1.00 steps/s, 59:49 left",
                     "demo: compiling the step of clips", "demo: step 12/3600",
                     "demo: step 32/3600, 1.00 steps/s, 59:28 left"]
    clock[0] += 20
    progress.update(42)
    assert stream.getvalue().endswith("step 42/3600, 1.33 s/step, 1:19:04 left\n")


def test_a_bar_begins_after_what_was_compiled():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    progress = Progress(9, 0, "demo", stream=Terminal())
    progress.compiles("the first step")
    assert progress._bar is None
    progress.update(1)
    assert (progress._bar.initial, progress._bar.n) == (1, 1)
    progress.update(2, "loss 1")
    assert progress._bar.n == 2
    progress.compiles("the step of clips")
    assert progress._bar is None
    progress.update(3)
    assert (progress._bar.initial, progress._bar.n) == (3, 3)
    progress.close()
