"""Several seeds of one study: means, spread, and every gate of every seed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from apt_jax.errors import UserError
from apt_jax.eval.study import ENTRIES, KINDS, floor_note, gates
from apt_jax.eval.table import lay_out

MEASURES = ("fd", "fd_motion", "sharpness_ratio")


def spread(summaries: Mapping[str, dict]) -> dict[str, Any]:
    """Mean and spread of each measurement.

    Args:
      summaries: name of a run -> its summary.json. They must be of the same length and data, and
        their seeds must differ. The data are the same where name, counts, sizes and the hash of
        the reference are; summaries of older versions have no such hash and go by the rest.

    Returns:
      {"runs", "seeds", "length", "image" and "video": {entry: {measure: {"mean", "sd", "values"}}},
      "gates": [{"text", "bounds", "ratios", "holds"}], "notes": [sentence]}. sd is the sample
      standard deviation (n - 1), None for one run.

    Raises:
      UserError: runs that cannot be compared.
    """
    if not summaries:
        raise UserError("no finished runs were given")
    seeds = {name: summary.get("seed") for name, summary in summaries.items()}
    if len(set(seeds.values())) < len(seeds):
        raise UserError(f"the runs' seeds are {seeds}; give runs of different seeds")
    _same("length", [summary.get("length", "short") for summary in summaries.values()])
    data = [summary.get("data") for summary in summaries.values()]
    _same("data", [_facts(value) for value in data])
    for kind in KINDS:
        hashes = {str(value[kind]["reference"]) for value in data if isinstance(value, dict)
                  and isinstance(value.get(kind), dict) and "reference" in value[kind]}
        _same(f"data ({KINDS[kind].lower()} of other pixels)", list(hashes))
    first = next(iter(summaries.values()))
    found: dict[str, Any] = {"runs": list(summaries), "seeds": list(seeds.values()),
                             "length": first.get("length", "short")}
    for kind in KINDS:
        parts = [summary[kind] for summary in summaries.values() if kind in summary]
        if len(parts) == len(summaries):
            found[kind] = {entry: _measures([part[entry] for part in parts]) for entry in ENTRIES
                           if all(entry in part for part in parts)}
    found["gates"] = [
        {"text": each[0].text, "bounds": each[0].bounds, "ratios": [g.ratio for g in each],
         "holds": [g.holds for g in each]}
        for each in zip(*(gates(summary) for summary in summaries.values()), strict=True)]
    found["notes"] = [note for note in (floor_note(first), _weights_note(summaries)) if note]
    return found


def _weights_note(summaries: Mapping[str, dict]) -> str:
    """Which weights the baseline was measured with, run by run, where a run chose the better."""
    found = []
    for kind, title in KINDS.items():
        entries = [(one.get(kind) or {}).get("consistency_1") or {} for one in summaries.values()]
        if any("other_fd" in entry for entry in entries):
            words = ("raw" if entry.get("weights") == "raw" else "averaged" if "other_fd" in entry
                     else "averaged (raw not measured)" for entry in entries)
            found.append(f"{title.lower()} {', '.join(words)}")
    return found and f"The consistency model's weights, run by run: {'; '.join(found)}." or ""


def _same(what: str, values: list) -> None:
    if any(value != values[0] for value in values):
        raise UserError(f"the runs differ in {what}; give runs of one study")


def _facts(data: Any) -> Any:
    """A summary's data without its hashes.

    The projection's, which older versions wrote, differs between machines on the same data.
    """
    if not isinstance(data, dict):
        return data
    return {key: _facts(value) for key, value in data.items()
            if key not in ("projection", "reference")}


def _measures(entries: list[dict]) -> dict[str, dict]:
    found = {}
    for name in MEASURES:
        values = [entry.get(name) for entry in entries]
        if all(isinstance(value, int | float) for value in values):
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            found[name] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    return found


def format_spread(found: dict[str, Any]) -> str:
    """`spread`'s result as text: a table per kind, then the gates with the ratio of each seed."""
    blocks = []
    for kind, title in KINDS.items():
        if kind in found:
            body = [[ENTRIES[entry], *(_cell(row.get(name), digits)
                                       for name, digits in zip(MEASURES, (1, 1, 2), strict=True))]
                    for entry, row in found[kind].items()]
            blocks.append(lay_out([title, "FD-MobileNetV2", "motion FD", "sharpness to data"], body))
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [f"seeds {seeds}; mean ± standard deviation"]
    for gate in found["gates"]:
        ratios = ", ".join("-" if r is None else f"{r:.2f}" for r in gate["ratios"])
        verdict = ("holds" if all(gate["holds"]) else "not measured" if None in gate["holds"]
                   else "DOES NOT HOLD")
        lines.append(f"{gate['text']} = {ratios}, {gate['bounds']}: {verdict}")
    remarks = [textwrap.fill(note, 100) for note in found.get("notes", ())]
    return "\n\n".join([*blocks, *remarks, "\n".join(lines)])


def _cell(value: dict | None, digits: int) -> str:
    if value is None:
        return "-"
    if value["sd"] is None:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"
