"""The page and the table of a study: whole, in part, and with damage."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from apt_jax.cli.main import main
from apt_jax.config import base_config, save_json
from apt_jax.errors import UserError
from apt_jax.eval import curves
from apt_jax.eval.curves import Series, line_plot, nice_ticks
from apt_jax.eval.report import write_report
from apt_jax.eval.samples import save_samples
from apt_jax.eval.study import COLUMNS, gates, read_study, read_summary
from apt_jax.eval.table import format_table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
FDS = {"floor": 12.0, "diffusion_25": 80.0, "consistency_1": 240.0, "apt_1": 120.0,
       "apt_1_raw": 150.0, "apt_2": 118.0}


def _summary():
    kind = {name: {"fd": fd, "sharpness": 0.1, "n": 6} for name, fd in FDS.items()}
    kind["diffusion_25"] |= {"guidance": 3.0, "seconds": 61.0}
    kind["consistency_1"]["sharpness"] = 0.05
    video = {name: entry | {"fd_motion": 7.0} for name, entry in kind.items()}
    video["apt_1"] = video["apt_1"] | {"fd": 200.0}
    return {"image": kind, "video": video, "data": {"name": "<emoji> & more"}, "seed": 0,
            "seconds": {"image": 400.0, "video": 300}}


@pytest.fixture
def study(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "summary.json").write_text(json.dumps(_summary()))
    for kind, frames in (("image", 1), ("video", 3)):
        for name in COLUMNS:
            save_samples(tmp_path / "samples" / kind / f"{name}.npz",
                         rng.integers(0, 256, (6, frames, 8, 8, 3), dtype=np.uint8),
                         [f"thing {i} <b>" for i in range(6)])
    run = tmp_path / "image"
    run.mkdir()
    config = base_config()
    config.stage, config.data.frames = "adversarial", (1,)
    save_json(config, run / "config.json")  # as a run writes it, tuples and all
    (run / "versions.json").write_text('{"jax": "1.2.3"}')
    (run / "metrics.jsonl").write_text("".join(json.dumps({
        "step": s, "discriminator/d_loss": 1.4 - s / 100, "generator/g_loss": 0.7,
        "discriminator/logit_real": s / 50, "discriminator/logit_fake": -s / 50,
        "discriminator/r1": 10.0 ** -s}) + "\n" for s in range(1, 6)))
    return tmp_path


def test_the_page_is_whole_and_self_contained(study):
    path = write_report(study, "A <title>")
    page = path.read_text()
    assert path == study / "report.html" and "A &lt;title&gt;" in page
    assert "Missing parts" not in page
    for text in COLUMNS.values():
        assert text in page
    # 14 prompts at most: 6 rows x 6 columns, then 6 samples with their 4 nearest
    assert page.count("data:image/png") == 6 * 6 + 6 * 5 + 1
    assert page.count("data:image/webp") == 6 * 6 + 5 * 5 + 1
    assert "thing 0 &lt;b&gt;" in page and "<b>thing" not in page and "thing 0 <b>" not in page
    assert "&lt;emoji&gt; &amp; more" in page
    assert "image: adversarial on images" in page and "1.2.3" in page
    assert page.count("<svg") == 3  # losses, logits, penalty
    # nothing is fetched and nothing runs
    assert not re.search(r"<script|<link|https?://|@import|url\(", page)
    assert "$" not in page


def test_verdicts_follow_the_numbers(study):
    image, diffusion, clips = gates(json.loads((study / "summary.json").read_text()))
    assert (image.ratio, image.holds) == (0.5, True)
    assert (diffusion.ratio, diffusion.holds) == (1.5, True)
    assert clips.ratio == pytest.approx(200 / 240) and not clips.holds
    page = write_report(study).read_text()
    assert page.count('<li class="holds">') == 2 and page.count('<li class="fails">') == 1


def test_a_long_study_has_stricter_gates_and_one_for_sharpness():
    entry = {"fd": 100.0, "sharpness": 0.1}
    kind = {"floor": entry, "diffusion_25": entry, "consistency_1": {"fd": 300.0},
            "apt_1": {"fd": 129.0, "sharpness": 0.116}}
    found = gates({"length": "long", "image": kind, "video": kind})
    assert [(g.kind, g.holds) for g in found] == [
        ("image", True), ("image", True), ("image", False),
        ("video", True), ("video", True), ("video", False)]
    assert found[2].ratio == pytest.approx(1.16) and found[2].bounds == "0.85 to 1.15"
    dull = kind | {"apt_1": {"fd": 140.0, "sharpness": 0.08}}
    assert [g.holds for g in gates({"length": "long", "image": dull})] == [False, False, False]
    assert [g.limit for g in gates({"image": kind})] == [0.6, 1.75]


def test_table_text():
    text = format_table(_summary())
    lines = {line.split("  ")[0]: line for line in text.split("\n\n")[0].splitlines()}
    assert re.search(r"consistency, 1 step +240\.0 +3\.00 +0\.50 +6", text)
    assert re.search(r"diffusion, 25 steps +80\.0 +1\.00 +1\.00 +6 +3 +1 min 01 s", text)
    assert "motion FD" not in lines["Images"] and text.count("motion FD") == 1
    assert text.count(": holds") == 2 and text.count("DOES NOT HOLD") == 1
    assert format_table({"image": {"apt_1": {"fd": 1.0}}}).count("not measured") == 2
    assert format_table({}) == ""


def test_notes_say_how_the_floor_and_the_baseline_were_measured(study):
    summary = _summary()
    summary["image"]["floor"] |= {"n": 1527, "halves": [763, 764], "fd": 81.0}
    summary["image"]["consistency_1"] |= {"weights": "raw", "other_fd": 251.04}
    text = format_table(summary)
    assert re.search(r"real against real +81\.0 +1\.00 +763", text)
    assert re.search(r"consistency, 1 step, raw weights +240\.0", text)
    assert "halves of the data (images 763 against 764)" in " ".join(text.split())
    assert "(images: raw, with the averaged ones 251.0)" in " ".join(text.split())
    (study / "summary.json").write_text(json.dumps(summary))
    page = write_report(study).read_text()
    assert "images 763 against 764" in page and "averaged ones 251.0" in page
    assert "<td>763</td>" in page and "1,527" not in page.partition('id="details"')[0]
    # The summaries that older versions wrote are committed: their tables say it too.
    old = read_summary(RESULTS / "demo")
    assert old["image"]["floor"]["n"] == 1527
    assert "images 763 against 764, clips 303 against 303" in " ".join(format_table(old).split())


DAMAGE = [
    ({"image": 3}, "image is no object"), ({"image": None}, "image is no object"),
    ({"image": {"floor": [1]}}, "image.floor is no object"),
    ({"video": {"apt_1": {"fd": 1.0, "n": "x"}}}, "video.apt_1.n is no number"),
    ({"image": {"apt_2": {"fd": float("nan")}}}, "image.apt_2.fd is no number"),
    ({"image": {"floor": {"halves": 7}}}, "image.floor.halves is no list"),
    ({"image": {"floor": {"halves": [1, "b"]}}}, "image.floor.halves are no counts"),
    ({"length": []}, "length is no text"), ({"seed": []}, "seed is no number"),
    ({"data": 5}, "data is no object"), ({"seconds": {"image": "long"}}, "seconds.image"),
    ([], "no JSON object")]


@pytest.mark.parametrize("summary, says", DAMAGE)
def test_a_damaged_summary_is_one_line_and_named_on_the_page(tmp_path, capsys, summary, says):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=re.escape(says)):
        read_summary(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert says in said
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    assert main(["report", str(tmp_path)]) == 0
    assert says in (tmp_path / "report.html").read_text()


def test_damaged_runs_are_named_and_the_rest_shown(study):
    (study / "image" / "config.json").write_text('{"data": 5}')
    (study / "image" / "versions.json").write_text("[1]")
    with open(study / "image" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": "six", "loss": 1.0}\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    (study / "other" / "metrics.jsonl").mkdir(parents=True)
    (study / "summary.json").write_text('{"data": {"name": "half a pair: \\ud83d"}}')
    page = write_report(study).read_text(encoding="utf-8")
    for text in ("config.json is missing or damaged", "versions.json is missing or damaged",
                 "3 damaged lines", "other: metrics.jsonl cannot be read", "half a pair: ?"):
        assert text in page
    assert page.count("<svg") == 3


def test_a_study_that_has_begun_names_everything_missing(tmp_path):
    run = tmp_path / "consistency"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    page = write_report(tmp_path).read_text()
    for text in ("no summary.json, which make demo", "nothing about images",
                 "nothing about clips", "config.json is missing", "No measurements yet"):
        assert text in page


def test_damage_is_named_and_the_rest_shown(study):
    (study / "samples" / "image" / "apt_2.npz").write_bytes(b"PK\x03\x04 half")
    (study / "samples" / "image" / "data.npz").unlink()
    (study / "image" / "versions.json").unlink()
    with open(study / "image" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "discr')
    page = write_report(study).read_text()
    for text in ("apt_2.npz is no sample file", "no data.npz, apt_2.npz",
                 "versions.json is missing", "1 damaged lines", "need apt_1.npz and data.npz"):
        assert text in page
    assert page.count("<svg") == 3
    with pytest.raises(UserError, match="no directory"):
        write_report(study / "nowhere")


def test_samples_meet_by_caption_where_orders_differ(study):
    found = read_study(study).samples["image"]["data"]
    order = [5, 4, 3, 2, 1, 0]
    before = write_report(study).read_text()
    save_samples(study / "samples" / "image" / "data.npz", found.frames[order],
                 [found.captions[i] for i in order])
    after = write_report(study).read_text()
    rows = [re.findall(r'alt="thing \d &lt;b&gt;, real" src="([^"]+)"', page)
            for page in (before, after)]
    assert rows[0] == rows[1] and len(rows[0]) == 12


def test_plots_are_xml_with_every_finite_point_inside():
    svg = line_plot("a < b", [
        Series("one", range(6), [1, 10, float("nan"), -5, 1000, None]), Series("two", [2], [3.0])],
        log=True)
    root = ElementTree.fromstring(svg)
    paths = [e.get("d") for e in root.iter("path") if "line" in e.get("class")]
    assert paths[0].count("M") == 2 and paths[0].count("L") == 1  # broken at nan and below zero
    numbers = [float(v) for v in re.findall(r"-?\d+\.?\d*", " ".join(p.replace("h0.01", "")
                                                                      for p in paths))]
    assert all(curves.LEFT <= x <= curves.WIDTH for x in numbers[::2])
    assert all(curves.TOP <= y <= curves.HEIGHT - curves.BOTTOM for y in numbers[1::2])
    assert "no values" in line_plot("x", [Series("y", [1, 2], [float("nan"), None])])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("odd", [10**400, 1e308, -1e308, 5e-324, 1e-300, True])
def test_a_damaged_value_leaves_the_curve_of_the_others(odd, log):
    svg = line_plot("x", [Series("y", [1, 2, 3], [2.0, odd, 3.0])], log=log)
    assert "line s0" in svg and ElementTree.fromstring(svg) is not None


def test_long_series_are_averaged_not_cut():
    n = 10_000
    svg = line_plot("x", [Series("", range(n), [float(i) for i in range(n)])])
    path = next(e.get("d") for e in ElementTree.fromstring(svg).iter("path")
                if "line" in e.get("class"))
    assert path.count("L") == curves.MAX_POINTS - 1


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 3, [-2, 0, 2]), (10, 1190, [250, 500, 750, 1000])])
def test_ticks_are_round_and_inside(low, high, expected):
    np.testing.assert_allclose(nice_ticks(low, high), expected)
