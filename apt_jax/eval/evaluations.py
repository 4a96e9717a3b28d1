"""What `apt-jax evaluate` writes: evaluation.json and samples.npz, and the rows of its table.

    {"settings": {...}, "floor": {...} or null, "train": {...}, "sweep": [{...}, ...],
     "held_out": {...} or null, "left_out": ["why a part is null", ...], "data": {...}}

"settings" are those of the best samples, absent where a file was measured ("samples" names it).
"sweep" is there for several values of guidance only.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from apt_jax.errors import UserError, disk_errors
from apt_jax.eval.json_checks import check_number, finite, need
from apt_jax.eval.progress import duration
from apt_jax.eval.samples import SampleSet, load_samples

FILE, SAMPLES = "evaluation.json", "samples.npz"
# Fields of an entry that are numbers, where it has them.
NUMBERS = ("fd_motion", "sharpness_ratio", "n", "dim", "seconds", "guidance")


class Evaluation(NamedTuple):
    """One evaluation of a folder: its name, the JSON, and the samples where they are there."""

    name: str
    result: dict
    samples: SampleSet | None

    @property
    def label(self) -> str:
        """What was measured: the mode, or the name of the file of samples."""
        return label(self.result)


def label(result: dict) -> str:
    settings = result.get("settings") or {}
    return str(settings.get("mode") or Path(str(result.get("samples") or "samples")).stem)


def write_result(folder: Path, result: dict) -> Path:
    """Write evaluation.json, whole or not at all, and return its path."""
    path = folder / FILE
    partial = folder / f"{FILE}.{os.getpid()}.tmp"
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read_result(path: Path) -> dict:
    """An evaluation.json. Raises UserError where it cannot be shown."""
    try:
        with disk_errors(path, "read"):
            result = json.loads(path.read_text(encoding="utf-8"))
        _check(result)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from None
    return result


def read_evaluation(path: Path, name: str, missing: list[str]) -> Evaluation | None:
    """The evaluation of an evaluation.json and the samples beside it; damage goes to `missing`."""
    result = samples = None
    try:
        result = read_result(path)
        # A file that was measured leaves no samples: those there are of an earlier evaluation.
        if "settings" in result:
            samples = load_samples(path.with_name(SAMPLES))
    except UserError as error:
        missing.append(str(error))
    return Evaluation(name, result, samples) if result else None


def _check(result) -> None:
    """Raises ValueError naming the first part of a result that a table could not show."""
    need(result, dict, "it holds no JSON object")
    for name in ("settings", "data"):
        need(result.get(name, {}), dict, f"{name} is no object")
    for line in need(result.get("left_out", []), list, "left_out is no list"):
        need(line, str, "left_out is no text")
    entries = {"floor": result.get("floor"), "train": need(result.get("train"), dict,
                                                           "train is no object")}
    sweep = need(result.get("sweep", []), list, "sweep is no list")
    entries |= {f"sweep.{i}": need(entry, dict, f"sweep.{i} is no object")
                for i, entry in enumerate(sweep)}
    for name, entry in entries.items():
        if need(entry, dict | None, f"{name} is no object") is None:
            continue
        if not finite(entry.get("fd")):
            raise ValueError(f"{name}.fd is no number")
        for key in NUMBERS:
            check_number(entry.get(key), f"{name}.{key}")
        for half in need(entry.get("halves", []), list, f"{name}.halves is no list"):
            need(half, int, f"{name}.halves are no counts")
    held = need(result.get("held_out"), dict | None, "held_out is no object")
    for key in ("kid", "kid_low", "kid_high", "confidence", "n", "n_reference") if held else ():
        if not finite(held.get(key)):
            raise ValueError(f"held_out.{key} is no number")


def table(result: dict, name: str) -> tuple[list[str], list[list[str]], list[float]]:
    """Headings (the first empty), cells, and the FD of each row.

    "real against real" first, where it was measured, then every value of the sweep.
    """
    floor, best = result.get("floor"), result["train"]
    motion = "fd_motion" in best
    headings = ["", "FD-MobileNetV2"] + ["motion FD"] * motion + [
        "sharpness to data", "n", "sampling time"]

    def cells(text, entry):
        ratio, seconds = entry.get("sharpness_ratio"), entry.get("seconds")
        count = min(entry.get("halves") or [entry.get("n") or 0])
        return [text, f"{entry['fd']:.1f}"] + [
            f"{entry.get('fd_motion') or 0:.1f}"] * motion + [
            "" if ratio is None else f"{ratio:.2f}", f"{count:,}",
            "" if seconds is None else duration(seconds)]

    rows = [("real against real", floor)] if floor else []
    sweep = result.get("sweep", [])
    for entry in sweep or [best]:
        text = f"{name}, guidance {entry['guidance']:g}" if entry.get("guidance") is not None else name
        rows.append((text + (" (best)" if sweep and entry == best else ""), entry))
    return headings, [cells(*row) for row in rows], [entry["fd"] for _, entry in rows]


def remarks(result: dict) -> list[str]:
    """What a reader of the table must know, in sentences: the last of them why parts are missing."""
    floor, best, held = (result.get(part) for part in ("floor", "train", "held_out"))
    lines = []
    known = ", ".join(part for part in (
        f"{best['dim']} dimensions" if "dim" in best else "",
        f"reference {str(best['reference'])[:12]}" if "reference" in best else "") if part)
    halves = (floor or {}).get("halves") or []
    if len(halves) == 2:
        lines.append("Real against real: halves of {:,} and {:,}, whose FD lies above that of all "
                     "(it falls with n); ".format(*halves) + f"{known}.")
    elif known:
        lines.append(f"{known[0].upper()}{known[1:]}.")
    if held:
        lines.append(
            f"Held-out captions: KID {1e3 * held['kid']:.2f} x 1e-3, "
            f"{held['confidence']:.0%} interval {1e3 * held['kid_low']:.2f} to "
            f"{1e3 * held['kid_high']:.2f}, "
            f"{held['n']:,} samples against {held['n_reference']:,}.")
    return lines + result.get("left_out", [])
