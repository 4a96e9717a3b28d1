"""The tables that a study and an evaluation print on the terminal."""

import textwrap

from apt_jax.eval import evaluations
from apt_jax.eval.progress import duration
from apt_jax.eval.study import ENTRIES, KINDS, entry_title, gates, notes


def _number(value, digits: str = ".1f") -> str:
    return format(value, digits) if isinstance(value, int | float) else "-"


def _ratio(value, base) -> str:
    known = isinstance(value, int | float) and isinstance(base, int | float) and base
    return f"{value / base:.2f}" if known else "-"


def rows(kind: dict) -> list[list[str]]:
    """Cells of one kind's part of the summary, a row per entry that is there, in fixed order.

    name, FD, FD against diffusion's, motion FD, sharpness against the data's, n, guidance, seconds.
    n of the floor is the size of a half, which is what its distance is measured with.
    """
    fd = (kind.get("diffusion_25") or {}).get("fd")
    sharp = (kind.get("floor") or {}).get("sharpness")
    out = []
    for name in ENTRIES:
        entry = kind.get(name)
        if not isinstance(entry, dict):
            continue
        out.append([
            entry_title(name, entry), _number(entry.get("fd")),
            "" if name == "floor" else _ratio(entry.get("fd"), fd),
            _number(entry.get("fd_motion")),
            "1.00" if name == "floor" else _ratio(entry.get("sharpness"), sharp),
            _number(min(entry["halves"]) if "halves" in entry else entry.get("n"), ","),
            _number(entry.get("guidance"), "g") if "guidance" in entry else "",
            duration(entry["seconds"]) if isinstance(entry.get("seconds"), int | float) else "",
        ])
    return out


HEADINGS = ("", "FD-MobileNetV2", "to diffusion", "motion FD", "sharpness to data", "n", "guidance",
            "sampling time")


def lay_out(headings: list[str], body: list[list[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right, headings underlined."""
    table = [headings, *body]
    widths = [max(len(row[i]) for row in table) for i in range(len(headings))]
    lines = ["  ".join([row[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]).rstrip() for row in table]
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def used_columns(body: list[list[str]]) -> list[int]:
    """The columns worth showing: name, FD, and every other one that has a value somewhere."""
    return [i for i in range(len(HEADINGS))
            if i < 2 or any(row[i] not in ("", "-") for row in body)]


def format_table(summary: dict) -> str:
    """The whole table as text: a block per kind, notes, then the gates with their ratios."""
    blocks = []
    for kind, title in KINDS.items():
        if kind in summary:
            body = rows(summary[kind])
            columns = used_columns(body)
            blocks.append(lay_out([title] + [HEADINGS[i] for i in columns[1:]],
                                  [[row[i] for i in columns] for row in body]))
    lines = []
    for gate in gates(summary):
        verdict = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[gate.holds]
        value = "-" if gate.ratio is None else f"{gate.ratio:.2f}"
        lines.append(f"{gate.text} = {value}, {gate.bounds}: {verdict}")
    remarks = [textwrap.fill(note, 100) for note in notes(summary)]
    return "\n\n".join([*blocks, *remarks, "\n".join(lines)]).rstrip()


def format_result(result: dict, name: str) -> str:
    """What `apt-jax evaluate` found as text: a row per value of guidance, then the remarks."""
    headings, body, _ = evaluations.table(result, name)
    return "\n".join([lay_out(headings, body), "", *evaluations.remarks(result)])
