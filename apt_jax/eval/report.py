"""One self-contained HTML page of a study: pictures side by side, curves, table, how it was made.

Everything is inline (PNG and animated WebP as data URIs, SVG curves, CSS); the page needs no
network and no script, and reads in light and dark. Parts that are missing are named on it.
"""

import html
import json
import os
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from apt_jax import media
from apt_jax.errors import UserError, disk_errors
from apt_jax.eval import report_curves, report_evaluations
from apt_jax.eval.measure import clip_features, known_features
from apt_jax.eval.nearest import nearest
from apt_jax.eval.progress import duration
from apt_jax.eval.report_pictures import CELL, image, spread
from apt_jax.eval.samples import SampleSet
from apt_jax.eval.study import COLUMNS, ENTRIES, KINDS, Study, gates, notes, read_study
from apt_jax.eval.table import HEADINGS, rows, used_columns

TITLE = "One step instead of twenty-five"
PROMPTS = {"image": 14, "video": 8}  # rows of the side-by-side
NEAREST = {"image": 10, "video": 5}  # rows of the memorisation check


def write_report(directory: Path | str, title: str = "") -> Path:
    """Write DIRECTORY/report.html from what is in the directory and return its path.

    title: "" is TITLE for what the demo makes, else the folder's name.
    Raises UserError where there is no such directory and where it has nothing to show; whatever
    else is missing is named on the page.
    """
    study = read_study(directory)
    if study.empty:
        # Of a file that is there and damaged the line says more than that nothing else is there.
        damage = [text for text in study.missing if "damaged" in text or "no sample file" in text]
        raise UserError(damage[0] if damage else (
            f"{study.directory} has nothing to show: no summary.json of make demo, no "
            "metrics.jsonl of apt-jax train, no evaluation.json of apt-jax evaluate; give a folder "
            "that one of them wrote"))
    title = title or (TITLE if study.demo else study.directory.resolve().name)
    sections = [("result", "Result", _result(study))]
    for kind, name in KINDS.items():
        if study.samples.get(kind):
            sections.append((kind, name, _side_by_side(study, kind) + _nearest(study, kind)
                             + _overview(study, kind)))
    if any(found.samples for found in study.evaluations):
        sections.append(("samples", "Samples", report_evaluations.pictures(study.evaluations)))
    if study.runs:
        sections.append(("curves", "Training curves", report_curves.section(study.runs)))
    sections.append(("method", "How it was measured", _method()))
    sections.append(("details", "Configurations and versions", _details(study)))
    if study.missing:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in study.missing)
        sections.insert(0, ("missing", "Missing parts", f'<ul class="missing">{items}</ul>'))
    template = resources.files("apt_jax.eval").joinpath("report_template.html").read_text("utf-8")
    page = Template(template).substitute(
        title=html.escape(title), lead=_lead(study), facts=_facts(study),
        navigation="<nav>" + "".join(
            f'<a href="#{key}">{name}</a>' for key, name, _ in sections) + "</nav>",
        body="\n".join(
            f'<section id="{key}"><h2>{name}</h2>\n{text}\n</section>'
            for key, name, text in sections))
    path = study.directory / "report.html"
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):  # "replace": half a surrogate pair, as JSON may hold, is no UTF-8
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    return path


# ---------------------------------------------------------------- words and numbers


def _lead(study: Study) -> str:
    if not study.demo:
        parts = ["How the samples of a model compare with the data"] * bool(study.evaluations)
        parts += ["the curves of its training" if parts else "The curves of a training run"] * bool(
            study.runs)
        return ", and ".join(parts) + "."
    kinds = [name.lower() for kind, name in KINDS.items()
             if kind in study.summary or study.samples.get(kind)]
    what = " and ".join(kinds) or "samples"
    return (f"Captioned {what} made in a single step by adversarial post-training (APT), beside "
            "the 25-step diffusion model it grew from and the consistency model it started at: the "
            "same prompts, the same noise. The pictures are rendered artwork, not photographs.")


def _facts(study: Study) -> str:
    facts = []
    data = study.summary.get("data")
    if isinstance(data, dict):
        facts += [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in data.items()]
    elif data:
        facts.append(f"data: {data}")
    if "seed" in study.summary:
        facts.append(f"seed {study.summary['seed']}")
    seconds = study.summary.get("seconds")
    if isinstance(seconds, dict):
        total = sum(v for v in seconds.values() if isinstance(v, int | float))
        facts.append(f"made in {duration(total)}")
    return " · ".join(html.escape(text) for text in facts)


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _result(study: Study) -> str:
    parts = []
    verdicts = gates(study.summary)
    if verdicts:
        items = []
        for gate in verdicts:
            state, word = {True: ("holds", "holds"), False: ("fails", "does not hold"),
                           None: ("", "not measured")}[gate.holds]
            value = "–" if gate.ratio is None else f"{gate.ratio:.2f}"
            items.append(
                f'<li class="{state}">{gate.text}<b>{value}</b>{gate.bounds}: '
                f'<span class="verdict">{word}</span></li>')
        parts.append(f'<ul class="gates">{"".join(items)}</ul>')
    parts += [_table(study.summary[kind], name) for kind, name in KINDS.items()
              if isinstance(study.summary.get(kind), dict)]
    parts += [f'<p class="soft">{html.escape(note)}</p>' for note in notes(study.summary)]
    parts += [report_evaluations.table(found) for found in study.evaluations]
    seconds = study.summary.get("seconds")
    if isinstance(seconds, dict) and seconds:
        stages = " · ".join(f"{html.escape(key.replace('_', ' '))} {duration(value)}"
                            for key, value in seconds.items() if isinstance(value, int | float))
        parts.append(f'<p class="soft">Wall-clock time: {stages}.</p>')
    return "\n".join(parts) or '<p class="missing">No measurements yet.</p>'


def _table(kind: dict, name: str) -> str:
    names = [entry for entry in ENTRIES if isinstance(kind.get(entry), dict)]
    distances = [kind[entry].get("fd") for entry in names]
    largest = max((d for d in distances if isinstance(d, int | float)), default=1) or 1
    body = rows(kind)
    shown = used_columns(body)[1:]
    lines = []
    for entry, distance, row in zip(names, distances, body):
        style = {"floor": ' class="floor"', "apt_1": ' class="main"'}.get(entry, "")
        width = 100 * distance / largest if isinstance(distance, int | float) else 0
        cells = "".join(f"<td>{row[i]}</td>" for i in shown)
        lines.append(f'<tr{style}><td>{row[0]}</td>{cells}'
                     f'<td class="bar"><div style="width:{width:.1f}%"></div></td></tr>')
    heads = "".join(f"<th>{HEADINGS[i]}</th>" for i in shown)
    return (f'<div class="wide"><h3>{name}</h3>'
            f'<table><thead><tr><th></th>{heads}<th></th></tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


def _method() -> str:
    return """
<p><b>FD-MobileNetV2</b> is the Fréchet distance between Gaussians fitted to ImageNet MobileNetV2
features at 96 px, projected on the leading principal components (128 unless the summary says
otherwise) of the whole real training set. It is not FID and cannot be compared with one. Lower is
better. For clips every frame counts as a picture; <b>motion FD</b> is the same distance on the
differences of neighbouring frames' features, and is no FVD.</p>
<p><b>Real against real</b> is the floor: random disjoint halves of the real set, and n the
size of a half. A distance of this kind falls as more samples are taken, so the floor of the whole
set lies lower: compare only rows with a like n.</p>
<p><b>Sharpness</b> is the mean absolute difference of neighbouring pixels, shown as a ratio to the
data's: below 1 is smoother, above 1 is sharper or noisier. Where a sampler has a guidance weight,
the row shows its best value.</p>
<p>The prompts shown are spread evenly over the set and were not picked. Samples in a row share
their noise.</p>"""


def _details(study: Study) -> str:
    parts = []
    for run in study.runs:
        for what, document in (("config", run.config), ("versions", run.versions)):
            if document:
                parts.append(_fold(f"{run.name}: {what}", json.dumps(document, indent=2)))
    if study.summary:
        parts.append(_fold("summary.json", json.dumps(study.summary, indent=2)))
    parts += [_fold(f"{found.name}: evaluation.json", json.dumps(found.result, indent=2))
              for found in study.evaluations]
    return "\n".join(parts) or "<p>None found.</p>"


def _fold(name: str, text: str) -> str:
    return (f"<details><summary>{html.escape(name)}</summary>"
            f"<pre>{html.escape(text)}</pre></details>")


# ---------------------------------------------------------------- pictures


def _same_row(samples: SampleSet, index: int, caption: str) -> np.ndarray | None:
    """The clip for a caption: at the same index where captions agree, else the caption's first."""
    if index < len(samples.captions) and samples.captions[index] == caption:
        return samples.frames[index]
    if caption in samples.captions:
        return samples.frames[samples.captions.index(caption)]
    return None


def _leader(found: dict[str, SampleSet]) -> str:
    """The entry whose captions choose the rows: APT's, or else the first there is."""
    return next(name for name in ("apt_1", *COLUMNS) if name in found)


def _side_by_side(study: Study, kind: str) -> str:
    found = study.samples[kind]
    columns = {name: text for name, text in COLUMNS.items() if name in found}
    captions = found[_leader(found)].captions
    if not captions:
        return '<p class="missing">The sample files are empty.</p>'
    lines = []
    for index in spread(len(captions), PROMPTS[kind]):
        cells = []
        for name, text in columns.items():
            clip = _same_row(found[name], index, captions[index])
            cells.append("<td>" + (
                f'<span class="blank" style="width:{CELL}px;height:{CELL}px"></span>'
                if clip is None else image(clip, f"{captions[index]}, {text}")) + "</td>")
        lines.append(f"<tr><td>{html.escape(captions[index])}</td>{''.join(cells)}</tr>")
    heads = "".join(f'<th{" class=main" if name == "apt_1" else ""}>{text}</th>'
                    for name, text in columns.items())
    frames, height, width = found[_leader(found)].frames.shape[1:4]
    size = f"{width} × {height} px" + (f", {frames} frames, looping" if frames > 1 else "")
    return (f'<p class="soft">{size}, enlarged without smoothing. A row is one caption and one '
            "noise; “real” is that caption's training picture.</p>"
            f'<div class="wide"><table class="side"><thead><tr><th>caption</th>{heads}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


def _nearest(study: Study, kind: str) -> str:
    found = study.samples[kind]
    if "apt_1" not in found or "data" not in found or not found["apt_1"].captions:
        return '<p class="missing">Nearest training pictures need apt_1.npz and data.npz.</p>'
    samples, data = found["apt_1"], found["data"]
    chosen = spread(len(samples.frames), NEAREST[kind])
    features = known_features(data.frames, study.directory / "cache")
    if features is None:
        features = clip_features(data.frames, label="nearest training pictures")
    index, distance = nearest(clip_features(samples.frames[chosen]).mean(1), features.mean(1), k=4)
    lines = []
    for row, sample in enumerate(chosen):
        cells = "".join(
            f'<td{" class=gap" if k == 0 else ""}>'
            f"{image(data.frames[i], data.captions[i])}"
            f'<span class="distance">{html.escape(data.captions[i])}<br>{d:.1f}</span></td>'
            for k, (i, d) in enumerate(zip(index[row], distance[row])))
        lines.append(f"<tr><td>{html.escape(samples.captions[sample])}</td>"
                     f"<td>{image(samples.frames[sample], samples.captions[sample])}</td>"
                     f"{cells}</tr>")
    heads = "".join(f'<th{" class=gap" if k == 0 else ""}>{text}</th>' for k, text in enumerate(
        ["nearest", "second", "third", "fourth"][:index.shape[1]]))
    return ("<h3>Nearest training pictures</h3>"
            '<p class="soft">The training pictures closest to an APT sample (Euclidean in the raw '
            "features, the number below; clips by the mean over frames). The sample's own caption "
            "may come first; a pixel-for-pixel copy would be memorisation.</p>"
            '<div class="wide"><table class="side top"><thead><tr><th>caption</th>'
            f'<th class="main">APT, 1 step</th>{heads}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


def _overview(study: Study, kind: str) -> str:
    """A fold with many APT samples at once: single rows can flatter."""
    if "apt_1" not in study.samples[kind]:
        return ""
    samples = study.samples[kind]["apt_1"].frames
    chosen = samples[spread(len(samples), 96 if kind == "image" else 40)]
    if not len(chosen):
        return ""
    sheet = media.clip_grid(chosen, columns=min(16 if kind == "image" else 10, len(chosen)))
    size = min(sheet.shape[1:3]) * media.factor_for(chosen, 64)
    picture = image(sheet, "many APT samples", size, "sheet")
    return (f"<details><summary>{len(chosen)} samples of APT in one step, spread over the "
            "set</summary>"
            f"<p>{picture}</p></details>")
