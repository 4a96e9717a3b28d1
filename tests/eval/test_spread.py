"""Means, spread and gates over the seeds of a study."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jax.errors import UserError
from apt_jax.eval.spread import format_spread, spread

ROOT = Path(__file__).resolve().parents[2]


def summary(seed, apt, diffusion=100.0):
    entries = {"floor": {"fd": 20.0, "sharpness": 0.1, "sharpness_ratio": 1.0},
               "diffusion_25": {"fd": diffusion}, "consistency_1": {"fd": 300.0},
               "apt_1": {"fd": apt, "sharpness": 0.1, "sharpness_ratio": 1.0}}
    return {"length": "long", "seed": seed, "data": {"name": "x"}, "image": entries}


def test_means_spread_and_gates():
    found = spread({"a": summary(0, 110.0), "b": summary(1, 120.0), "c": summary(2, 160.0)})
    assert found["image"]["apt_1"]["fd"] == {
        "mean": 130.0, "sd": pytest.approx(26.4575131), "values": [110.0, 120.0, 160.0]}
    assert "video" not in found
    gate = found["gates"][1]
    assert gate["ratios"] == [1.1, 1.2, 1.6] and gate["holds"] == [True, True, False]
    text = format_spread(found)
    assert "130.0 ± 26.5" in text and "1.10, 1.20, 1.60, at most 1.3: DOES NOT HOLD" in text
    assert "seeds 0, 1, 2" in text
    assert "Clips" not in text
    better = summary(3, 100.0)
    better["image"]["consistency_1"] |= {"weights": "raw", "other_fd": 320.0}
    text = " ".join(format_spread(spread({"a": summary(0, 110.0), "d": better})).split())
    assert "run by run: images averaged (raw not measured), raw." in text


def test_one_run_has_no_spread():
    found = spread({"a": summary(0, 110.0)})
    assert found["image"]["apt_1"]["fd"]["sd"] is None
    assert "±" not in format_spread(found).splitlines()[3]


@pytest.mark.parametrize(("change", "says"), [
    ({"seed": 0}, "seeds are"), ({"length": "short"}, "differ in length"),
    ({"data": {"name": "y"}}, "differ in data")])
def test_runs_that_cannot_be_compared(change, says):
    other = {**copy.deepcopy(summary(1, 120.0)), **change}
    with pytest.raises(UserError, match=says):
        spread({"a": summary(0, 110.0), "b": other})
    with pytest.raises(UserError, match="no finished runs"):
        spread({})


def test_committed_summaries_of_one_data_set_compare():
    """Studies on several machines, their features by programs of other options: the floors agree to
    float32's rounding. An older summary names its projection, which every machine fitted anew, and no
    pixels, as one of today does."""
    results = ROOT / "docs" / "results"
    short = json.loads((results / "demo" / "summary.json").read_text())
    today = [json.loads(path.read_text()) for path in sorted(
        (results / "demo-long").glob("demo-long-*.json"))]
    assert len(today) >= 2
    older = [{**copy.deepcopy(short), "length": "long", "seed": seed} for seed in (7, 8)]
    for one, projection in zip(older, ("one machine's", "another machine's")):
        for kind in ("image", "video"):
            one["data"][kind]["projection"] = projection
            one["data"][kind].pop("reference", None)
    runs = dict(zip("abcde", (*older, *today)))
    found = spread(runs)
    assert "clips 303 against 303" in " ".join(format_spread(found).split())
    floor = found["video"]["floor"]["fd"]
    assert floor["sd"] < 1e-6 * floor["mean"]
    one = today[1]["data"]["video"]
    assert one["reference"] == today[0]["data"]["video"]["reference"]
    reference, one["reference"] = one["reference"], "c0ffe0"
    with pytest.raises(UserError, match="clips of other pixels"):
        spread(runs)
    one["reference"] = reference
    one["train"] += 1
    with pytest.raises(UserError, match="differ in data"):
        spread(runs)


def test_the_command_writes_what_it_prints(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"run{seed}").mkdir()
        (tmp_path / f"run{seed}/summary.json").write_text(json.dumps(summary(seed, 110.0 + seed)))
    (tmp_path / "run0/image.png").write_bytes(b"picture")
    command = [sys.executable, str(ROOT / "launch/seeds.py"), str(tmp_path / "run0")]
    done = subprocess.run([*command, str(tmp_path / "run1"), "--out", str(tmp_path / "out")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/table.txt").read_text() == done.stdout
    assert json.loads((tmp_path / "out/run1.json").read_text())["seed"] == 1
    assert (tmp_path / "out/image.png").read_bytes() == b"picture"
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.startswith("seeds: ")
    assert missing.stderr.count("\n") == 1
