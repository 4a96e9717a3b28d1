"""`apt-jax report` on what `apt-jax evaluate` and `apt-jax train` write: one folder, no study."""

import json

import numpy as np
import pytest

from apt_jax.cli.main import main
from apt_jax.config import base_config, save_json
from apt_jax.eval.samples import save_samples
from apt_jax.eval.study import read_study, read_summary

ENTRY = {"fd": 120.5, "sharpness": 0.1, "sharpness_ratio": 1.25, "n": 300, "dim": 128,
         "reference": "0123456789abcdef", "seconds": 2.0}
RESULT = {"settings": {"mode": "euler", "steps": 25}, "train": ENTRY | {"guidance": 3.0},
          "floor": ENTRY | {"fd": 20.0, "halves": [150, 151]},
          "sweep": [ENTRY | {"fd": 140.0, "guidance": 1.0}, ENTRY | {"guidance": 3.0}],
          "held_out": None, "left_out": ["KID: no held-out <records>"]}


def evaluation(folder, result=RESULT):
    """A folder as `apt-jax evaluate` leaves it."""
    save_samples(folder / "samples.npz", np.zeros((5, 1, 8, 8, 3), np.uint8),
                 [f"thing <{i}>" for i in range(5)])
    (folder / "evaluation.json").write_text(json.dumps(result))


def run(folder):
    """A run's folder, as far as the report reads it."""
    folder.mkdir(exist_ok=True)
    save_json(base_config(), folder / "config.json")
    (folder / "versions.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')


def test_an_evaluations_folder_shows_its_table_and_samples(tmp_path, capsys):
    evaluation(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for text in ("euler, guidance 3 (best)", "140.0", "120.5", "real against real", "1.25"):
        assert text in page and text in said
    assert "no held-out &lt;records&gt;" in page and "halves of 150 and 151" in page
    assert page.count("data:image/png") == 5 and "thing &lt;4&gt;" in page
    for untrue in ("Missing parts", "make demo", "No measurements", "One step instead"):
        assert untrue not in page
    assert f"<h1>{tmp_path.name}</h1>" in page


def test_a_measured_file_has_a_row_and_not_the_samples_of_before(tmp_path):
    evaluation(tmp_path, {"samples": "x/apt_1.npz", "train": ENTRY, "floor": None})
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<td>apt_1</td>" in page and "data:image" not in page and "real against real<" not in page


def test_a_guidance_that_is_none_is_not_named(tmp_path):
    evaluation(tmp_path, {"train": ENTRY | {"guidance": None}, "floor": None})
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "120.5" in page and "guidance None" not in page


def test_a_runs_folder_shows_its_curves_and_its_evaluation(tmp_path):
    run(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and "no training runs" not in page
    assert f"--checkpoint {tmp_path} --out {tmp_path / 'evaluation'}" in page
    evaluation(tmp_path / "evaluation")
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and "120.5" in page and "Missing parts" not in page


def test_a_study_shows_the_evaluations_of_its_runs(tmp_path):
    (tmp_path / "summary.json").write_text('{"image": {"apt_1": {"fd": 77.0}}}')
    run(tmp_path / "image")
    evaluation(tmp_path / "image" / "evaluation")
    study = read_study(tmp_path)
    assert study.demo and [found.name for found in study.evaluations] == ["image/evaluation"]
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "77.0" in page and "120.5" in page and "One step instead" in page


def test_a_folder_without_anything_is_one_line_and_no_page(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "nothing to show" in said and "metrics.jsonl of apt-jax train" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("result, says", [
    ([], "it holds no JSON object"), ({}, "train is no object"), ({"train": {"fd": None}}, "train.fd"),
    ({"train": ENTRY, "floor": {"fd": 1.0, "halves": ["a", 2]}}, "floor.halves are no counts"),
    ({"train": ENTRY, "held_out": {"kid": 1.0}}, "held_out.kid_low is no number")])
def test_a_damaged_evaluation_is_one_line(tmp_path, capsys, result, says):
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    assert main(["report", str(tmp_path)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"evaluation.json is damaged ({says}" in said and not (tmp_path / "report.html").exists()
    run(tmp_path)  # something else to show: the damage is then named on the page
    assert main(["report", str(tmp_path)]) == 0
    assert says in (tmp_path / "report.html").read_text()


def test_only_the_demo_is_said_to_write_a_summary(tmp_path):
    with pytest.raises(Exception, match="which make demo .* writes when it is done; run it") as error:
        read_summary(tmp_path)
    assert "evaluate" not in str(error.value)
