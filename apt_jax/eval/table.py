"""The table that a study prints on the terminal."""

from apt_jax.eval.progress import duration
from apt_jax.eval.study import ENTRIES, KINDS, gates


def _number(value, digits: str = ".1f") -> str:
    return format(value, digits) if isinstance(value, int | float) else "-"


def _ratio(value, base) -> str:
    known = isinstance(value, int | float) and isinstance(base, int | float) and base
    return f"{value / base:.2f}" if known else "-"


def rows(kind: dict) -> list[list[str]]:
    """Cells of one kind's part of the summary, a row per entry that is there, in fixed order.

    name, FD, FD against diffusion's, motion FD, sharpness against the data's, n, guidance, seconds.
    """
    fd = (kind.get("diffusion_25") or {}).get("fd")
    sharp = (kind.get("floor") or {}).get("sharpness")
    out = []
    for name, text in ENTRIES.items():
        entry = kind.get(name)
        if not isinstance(entry, dict):
            continue
        out.append([
            text, _number(entry.get("fd")),
            "" if name == "floor" else _ratio(entry.get("fd"), fd),
            _number(entry.get("fd_motion")),
            "1.00" if name == "floor" else _ratio(entry.get("sharpness"), sharp),
            f"{entry['n']:,}" if "n" in entry else "-",
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
    """The whole table as text: a block per kind, then the gates with their ratios."""
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
    return "\n\n".join([*blocks, "\n".join(lines)]).rstrip()
