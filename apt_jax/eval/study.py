"""A study's directory: what the demo leaves behind and the table and the report read.

    summary.json               {"image": {entry: {...}}, "video": {...}, "data", "seed", "seconds"}
    samples/{image,video}/     NAME.npz: the samples behind each entry; data.npz: the real frames
    RUN/                       metrics.jsonl, config.json, versions.json of each training run

Everything but the directory itself may be missing (a run in progress, a tiny test): it is then
named in `Study.missing`, never guessed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from apt_jax.config import config_from_json
from apt_jax.errors import UserError
from apt_jax.eval.samples import SampleSet, load_samples

KINDS = {"image": "Images", "video": "Clips"}
# Entries of summary.json in the order of table and columns, and what they are called.
ENTRIES = {
    "floor": "real against real",
    "diffusion_25": "diffusion, 25 steps",
    "consistency_1": "consistency, 1 step",
    "apt_1": "APT, 1 step",
    "apt_1_raw": "APT, 1 step, raw weights",
    "apt_2": "APT, 2 steps",
}
COLUMNS = {"data": "real"} | {name: text for name, text in ENTRIES.items() if name != "floor"}
_SHORT = {"apt_1": "APT in 1 step", "consistency_1": "consistency model in 1 step",
          "diffusion_25": "diffusion in 25 steps"}
# length of the study -> kind -> (entry, against, what the ratio of their FDs must not exceed).
GATES = {
    "short": {
        "image": (("apt_1", "consistency_1", 0.6), ("apt_1", "diffusion_25", 1.75)),
        "video": (("apt_1", "consistency_1", 0.7),),
    },
    "long": {kind: (("apt_1", "consistency_1", 0.45), ("apt_1", "diffusion_25", 1.3))
             for kind in KINDS},
}
# In a long study the one-step samples are as sharp as the data, within this part.
SHARPNESS = 0.15


@dataclass(frozen=True)
class Gate:
    """A ratio of two measurements and its limits. ratio is None where one of them is missing.

    against "sharpness" compares the entry's sharpness with the data's, else FDs are compared.
    """

    kind: str
    entry: str
    against: str
    limit: float
    ratio: float | None
    low: float = 0.0

    @property
    def text(self) -> str:
        if self.against == "sharpness":
            return f"{KINDS[self.kind]}: sharpness of {_SHORT[self.entry]} / the data's"
        return f"{KINDS[self.kind]}: FD of {_SHORT[self.entry]} / {_SHORT[self.against]}"

    @property
    def bounds(self) -> str:
        return f"{self.low:g} to {self.limit:g}" if self.low else f"at most {self.limit:g}"

    @property
    def holds(self) -> bool | None:
        return None if self.ratio is None else self.low <= self.ratio <= self.limit


@dataclass(frozen=True)
class Run:
    """One training run: its folder's name, config, versions, and metrics (one dict a line)."""

    name: str
    config: dict
    versions: dict
    metrics: list[dict]

    @property
    def title(self) -> str:
        frames = (self.config.get("data") or {}).get("frames") or ()
        kind = "" if not frames else " on clips" if max(frames) > 1 else " on images"
        stage = self.config.get("stage")
        return f"{self.name}: {stage}{kind}" if stage else self.name


@dataclass
class Study:
    """A study's parts as far as they are there; `missing` names the rest, one line each."""

    directory: Path
    summary: dict
    samples: dict[str, dict[str, SampleSet]]
    runs: list[Run]
    missing: list[str] = field(default_factory=list)


def gates(summary: dict) -> list[Gate]:
    """Every gate of the kinds that the summary holds; its "length" says which (none: short)."""
    found = []
    length = summary.get("length", "short")
    for kind, rules in GATES.get(length, {}).items():
        if kind not in summary:
            continue
        for entry, against, limit in rules:
            ratio = _ratio(*((summary[kind].get(name) or {}).get("fd") for name in (entry, against)))
            found.append(Gate(kind, entry, against, limit, ratio))
        if length == "long":
            ratio = _ratio(*((summary[kind].get(name) or {}).get("sharpness")
                             for name in ("apt_1", "floor")))
            found.append(Gate(kind, "apt_1", "sharpness", 1 + SHARPNESS, ratio, 1 - SHARPNESS))
    return found


def _ratio(value, base) -> float | None:
    known = all(isinstance(v, int | float) for v in (value, base)) and base
    return value / base if known else None


def read_summary(directory: Path | str) -> dict:
    """summary.json of a directory. Raises UserError where it is missing or no JSON object."""
    path = Path(directory) / "summary.json"
    if not path.is_file():
        raise UserError(f"{directory} has no summary.json; run make demo or apt-jax evaluate first")
    try:
        summary = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from None
    if not isinstance(summary, dict):
        raise UserError(f"{path} holds no JSON object; delete it and evaluate again")
    return summary


def read_study(directory: Path | str) -> Study:
    """Read all parts. Raises UserError only where the directory itself is missing."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no directory {directory}; give the one that the demo or evaluate wrote")
    study = Study(directory, {}, {}, [])
    try:
        study.summary = read_summary(directory)
    except UserError as error:
        study.missing.append(str(error))
    for kind in KINDS:
        _read_samples(study, kind)
    for path in (*directory.glob("*/metrics.jsonl"), *directory.glob("*/*/metrics.jsonl")):
        study.runs.append(_read_run(study, path))
    # the order of the method: pre-training, distillation, APT; images before clips
    order = ("pretrain", "consistency", "adversarial")
    study.runs.sort(key=lambda run: (
        max((run.config.get("data") or {}).get("frames") or (0,)) > 1,
        order.index(run.config["stage"]) if run.config.get("stage") in order else len(order),
        run.name))
    if not study.runs:
        study.missing.append("no training runs (folders with metrics.jsonl), so no curves")
    return study


def _read_samples(study: Study, kind: str) -> None:
    folder = study.directory / "samples" / kind
    found = study.samples.setdefault(kind, {})
    for name in COLUMNS:
        if not (folder / f"{name}.npz").is_file():
            continue
        try:
            found[name] = load_samples(folder / f"{name}.npz")
        except UserError as error:
            study.missing.append(str(error))
    absent = [name for name in COLUMNS if name not in found]
    if found and absent:
        study.missing.append(f"samples/{kind}: no {', '.join(f'{name}.npz' for name in absent)}")
    elif absent and kind not in study.summary:
        study.missing.append(f"nothing about {KINDS[kind].lower()}: neither summary nor samples")
    elif absent:
        study.missing.append(f"no samples in samples/{kind}")


def _read_run(study: Study, path: Path) -> Run:
    name = str(path.parent.relative_to(study.directory))
    documents = []
    # A run writes its tuples in a form of its own; config_from_json reads that and plain JSON.
    readers = {"config.json": lambda text: config_from_json(text).to_dict(),
               "versions.json": json.loads}
    for file, read in readers.items():
        try:
            documents.append(read((path.parent / file).read_text()))
        except (OSError, ValueError, UserError):
            documents.append({})
            study.missing.append(f"{name}: {file} is missing or damaged")
    metrics, damaged = [], 0
    for line in path.read_text().splitlines():
        try:  # a killed run may leave half a line
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            metrics.append(row)
        else:
            damaged += 1
    if damaged:
        study.missing.append(f"{name}: {damaged} damaged lines of metrics.jsonl were left out")
    if not metrics:
        study.missing.append(f"{name}: metrics.jsonl has no lines yet")
    return Run(name, *documents, metrics)
