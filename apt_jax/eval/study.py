"""A study's directory: what the demo leaves behind and the table and the report read.

    summary.json               {"image": {entry: {...}}, "video": {...}, "data", "seed", "seconds"}
    samples/{image,video}/     NAME.npz: the samples behind each entry; data.npz: the real frames
    RUN/                       metrics.jsonl, config.json, versions.json of each training run
    RUN/evaluation/            evaluation.json, samples.npz of `apt-jax evaluate`

The folder of one run and that of one evaluation are read as well: what lies in RUN/ above then lies
in the directory itself. Everything but the directory itself may be missing or damaged (a run in progress, a tiny test, a
full disk): it is then named in `Study.missing`, never guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apt_jax.config import config_from_json
from apt_jax.errors import UserError, disk_errors
from apt_jax.eval.evaluations import FILE as EVALUATION
from apt_jax.eval.evaluations import Evaluation, read_evaluation
from apt_jax.eval.json_checks import check_number, finite, need
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
# Fields of an entry that are numbers, where it has them.
NUMBERS = ("fd", "fd_motion", "fd_low", "fd_high", "other_fd", "sharpness", "sharpness_ratio", "n",
           "seconds", "guidance", "steps", "time")
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
    """A study's parts as far as they are there; `missing` names the rest, one line each.

    demo: whether it is, or is becoming, what launch/demo.py makes, not one run or evaluation.
    """

    directory: Path
    summary: dict
    samples: dict[str, dict[str, SampleSet]]
    runs: list[Run]
    evaluations: list[Evaluation] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    demo: bool = True

    @property
    def empty(self) -> bool:
        """Whether there is nothing at all to show."""
        return not (self.summary or any(self.samples.values()) or self.runs or self.evaluations)


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


def entry_title(name: str, entry: Mapping) -> str:
    """What a row is called: of a baseline that was measured at its better weights, which."""
    text = ENTRIES[name]
    return f"{text}, raw weights" if entry.get("weights") == "raw" and "raw" not in text else text


def notes(summary: Mapping) -> list[str]:
    """What a reader of the tables must know, in sentences; none for a summary without entries."""
    return [note for note in (floor_note(summary), _weights_note(summary)) if note]


def floor_note(summary: Mapping) -> str:
    """Why a model may score below "real against real"; "" where that was not measured."""
    halves = {name.lower(): (summary[kind].get("floor") or {}).get("halves")
              for kind, name in KINDS.items() if kind in summary}
    sizes = ", ".join(f"{name} {pair[0]:,} against {pair[1]:,}"
                      for name, pair in halves.items() if pair)
    return sizes and (
        f"Real against real is measured between random halves of the data ({sizes}). FD falls with "
        "n, so it lies above what as much real data as there are samples would score, and a "
        "model's distance may fall below it.")


def _weights_note(summary: Mapping) -> str:
    found = []
    for kind, name in KINDS.items():
        entry = (summary.get(kind) or {}).get("consistency_1") or {}
        if isinstance(entry.get("other_fd"), int | float):
            called = ["averaged", "raw"]
            one, other = called[::-1] if entry.get("weights") == "raw" else called
            found.append(f"{name.lower()}: {one}, with the {other} ones {entry['other_fd']:.1f}")
    return found and ("The consistency model is shown with the better of its raw and averaged "
                      f"weights ({'; '.join(found)}).") or ""


def read_summary(directory: Path | str) -> dict:
    """summary.json of a directory. Raises UserError where it is missing or not as the demo's is."""
    path = Path(directory) / "summary.json"
    if not path.is_file():
        raise UserError(f"{directory} has no summary.json, which make demo (launch/demo.py) writes "
                        "when it is done; run it to its end, or give its work directory")
    try:
        with disk_errors(path, "read"):
            summary = json.loads(path.read_text(encoding="utf-8"))
        _check(summary)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run launch/demo.py again") from None
    return summary


def _check(summary) -> None:
    """Raises ValueError naming the first part of a summary that tables could not show."""
    need(summary, dict, "it holds no JSON object")
    need(summary.get("length", ""), str, "length is no text")
    need(summary.get("seed"), int | str | None, "seed is no number")
    need(summary.get("data"), dict | str | None, "data is no object")
    for stage, value in need(summary.get("seconds", {}), dict, "seconds is no object").items():
        check_number(value, f"seconds.{stage}")
    for kind in KINDS:
        if kind not in summary:
            continue
        for name, entry in need(summary[kind], dict, f"{kind} is no object").items():
            if name not in ENTRIES:
                continue
            need(entry, dict, f"{kind}.{name} is no object")
            for key in NUMBERS:
                check_number(entry.get(key), f"{kind}.{name}.{key}")
            if "halves" in entry:
                what = f"{kind}.{name}.halves"
                if len(need(entry["halves"], list, f"{what} is no list")) != 2:
                    raise ValueError(f"{what} are not two")
                for half in entry["halves"]:
                    check_number(need(half, int, f"{what} are no counts"), what)


def read_study(directory: Path | str) -> Study:
    """Read all parts. Raises UserError only where the directory itself is missing."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no directory {directory}; give the one that make demo, apt-jax train or "
                        "apt-jax evaluate wrote")
    study = Study(directory, {}, {}, [])
    for path in _found(directory, EVALUATION):
        if found := read_evaluation(path, _name(study, path), study.missing):
            study.evaluations.append(found)
    own = (directory / "metrics.jsonl").is_file()
    study.demo = ((directory / "summary.json").is_file() or (directory / "samples").is_dir()
                  or not (own or study.evaluations or study.missing))
    if study.demo:
        try:
            study.summary = read_summary(directory)
        except UserError as error:
            study.missing.append(str(error))
        for kind in KINDS:
            _read_samples(study, kind)
    for path in _found(directory, "metrics.jsonl"):
        study.runs.append(_read_run(study, path))
    # the order of the method: pre-training, distillation, APT; images before clips
    order = ("pretrain", "consistency", "adversarial")
    study.runs.sort(key=lambda run: (
        max((run.config.get("data") or {}).get("frames") or (0,)) > 1,
        order.index(run.config["stage"]) if run.config.get("stage") in order else len(order),
        run.name))
    if study.demo and not study.runs:
        study.missing.append("no training runs (folders with metrics.jsonl), so no curves")
    if own and not study.evaluations:
        study.missing.append(f"no evaluation, so no distances; run apt-jax evaluate --checkpoint "
                             f"{directory} --out {directory / 'evaluation'}")
    return study


def _found(directory: Path, file: str) -> list[Path]:
    """The files of a name in a directory, its folders and theirs."""
    return sorted(path for at in ("", "*/", "*/*/") for path in directory.glob(at + file))


def _name(study: Study, path: Path) -> str:
    """What a file's folder is called: its path below the directory, or the directory's own name."""
    folder = path.parent
    return (folder.resolve().name if folder == study.directory
            else str(folder.relative_to(study.directory)))


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
    name = _name(study, path)
    documents = []
    for file, read in {"config.json": _config, "versions.json": _versions}.items():
        try:
            documents.append(read((path.parent / file).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, UserError):
            documents.append({})
            study.missing.append(f"{name}: {file} is missing or damaged")
    metrics, damaged = [], 0
    try:  # "replace": bytes that are no text cost their line only
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        study.missing.append(f"{name}: metrics.jsonl cannot be read ({error.strerror})")
        lines = []
    for line in lines:
        try:  # a killed run may leave half a line
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and finite(row.get("step")):
            metrics.append(row)
        else:
            damaged += 1
    if damaged:
        study.missing.append(f"{name}: {damaged} damaged lines of metrics.jsonl were left out")
    if not metrics:
        study.missing.append(f"{name}: metrics.jsonl has no lines yet")
    return Run(name, *documents, metrics)


def _config(text: str) -> dict:
    """A run's config.json, whose tuples have a form of their own; ValueError if it is none."""
    config = config_from_json(text).to_dict()
    data = need(config.get("data") or {}, dict, "data is no object")
    for count in need(data.get("frames") or (), list | tuple, "data.frames is no list"):
        need(count, int, "data.frames are no counts")
    need(config.get("stage"), str | None, "stage is no text")
    return config


def _versions(text: str) -> dict:
    return need(json.loads(text), dict, "it holds no JSON object")
