"""metrics.jsonl is never doubled or torn; progress lines say rate and time left."""

import io
import json

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


def test_a_process_that_does_not_write_leaves_no_files(tmp_path):
    log = MetricLog(tmp_path, 0, writes=False)
    log.write(1, {"loss": 0.5})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(4, 2, "demo", stream=stream, every_seconds=0.0)
    progress.update(3, "loss 0.5")
    progress.update(4)
    progress.say("hello")
    progress.close()
    first, last, said = stream.getvalue().splitlines()
    assert first.startswith("demo: step 3/4, ") and "left" in first and "loss 0.5" in first
    assert "step 4/4" in last and said == "hello"
