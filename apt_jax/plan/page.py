"""The page and the plot of the plans that are kept in docs/plans/ (launch/plans.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_jax.parallel.flags import compiler_options
from apt_jax.plan.chips import parse_topology
from apt_jax.plan.programs import INFERENCE
from apt_jax.plan.targets import (
    CONTEXT_TARGET,
    OTHERS,
    PEAKS,
    REASONS,
    missed,
    over_fsdp,
    parameter_gathers,
    reason,
    sums,
    tokens_ratio,
    training_steps,
    unjudged,
)

HEAD = """\
# Plans that were compiled

Written by `python launch/plans.py --page` from the JSON files beside it, which
`python launch/plans.py` makes; edit neither. Every row is one call of `apt-jax plan` (the command
stands in its file, with the versions) by the real compiler, without the hardware. GiB are per device
and XLA's own; "fits" keeps 6% of the memory for the driver. Times are models
([plan.md](../plan.md)): products at the stated efficiencies, transfers at data-sheet rates less what
the work beside them hides.
"""


def write(folder: Path, results: Mapping[str, dict], wanted: Mapping[str, str]) -> None:
    """folder/README.md, and folder/weak_scaling.svg where two sizes of the video stage are there.

    Args:
      results: name -> {"command", "versions", "revision" (lately), "plan"}.
      wanted: name -> command of every plan that belongs on the page.
    """
    blocks = [HEAD, memory(results), traffic(results), targets(results), flags(results)]
    scaling = weak_scaling(results)
    if len(scaling) > 1:
        blocks.append(scaling_text(scaling))
        plot(scaling, folder / "weak_scaling.svg")
    missing = [name for name in wanted if name not in results]
    if missing:
        blocks.append("## Not run yet\n\n" + "\n".join(
            f"- {name}: `{wanted[name]}`" for name in missing) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join(blocks))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _programs(plan: dict) -> list[tuple[str, dict]]:
    return list(plan["programs"].items())


def mesh_text(plan: dict) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "1"


def seconds_text(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.2f} s" if value >= 0.1 else (
        f"{value * 1e3:.1f} ms")


def memory(results: Mapping[str, dict]) -> str:
    rows = []
    for name, result in results.items():
        plan = result["plan"]
        peaks = ", ".join(f"{p} {v['peak_gib']:.1f}" + (" (refused)" if v["refused"] else "")
                          for p, v in _programs(plan))
        state = ", ".join(f"{k} {v:.1f}" for k, v in _programs(plan)[0][1]["parts_gib"].items())
        rows.append([
            f"[{name}]({name}.json)", mesh_text(plan),
            f"{plan['batch']:,} / {plan['microbatch']:,} of {plan['tokens']:,}", state, peaks,
            f"{plan['usable_gib']:.1f}", "yes" if plan["fits"] else "**no**"])
    return "## Memory, GiB per device\n\n" + table(
        ["plan", "mesh", "samples an update / at a time, tokens", "held by the first step",
         "peak", "usable", "fits"], rows)


def traffic(results: Mapping[str, dict]) -> str:
    rows = []
    for name, result in results.items():
        for label, p in _programs(result["plan"]):
            if p["refused"]:
                rows.append([name, label, f"{p['flops_forward_tflop']:,.0f}", "", "", "", "", "",
                             p["refused"]])
                continue
            gathers, hidden = parameter_gathers(p)
            rows.append([
                name, label, f"{p['flops_forward_tflop']:,.0f}", seconds_text(p["floor_seconds"]),
                seconds_text(p["step_seconds"]),
                f"{100 * p['exposed_seconds'] / p['step_seconds']:.1f}%",
                f"{100 * hidden:.0f}% of {seconds_text(gathers)}" if gathers else "",
                _ratio_text(p),
                f"{len(sums(p))} all-reduces, "
                f"{sum('float32 all-gather' in n for n in p['notes'])} float32 gathers"])
    return "## Work and traffic of one call\n\n" + table(
        ["plan", "program", "forward TFLOP a sample", "floor at peak", "modelled", "exposed",
         "gathers in the layers, hidden", "tokens sent / least possible",
         "sums from 4 MiB, float32 gathers from 64 MiB on"], rows)


def targets(results: Mapping[str, dict]) -> str:
    """The targets against what was found, misses with their reasons."""
    lines, rows, marks = [], [], set()
    for name, text, most in PEAKS:
        if name in results:
            plan = results[name]["plan"]
            peak = max(p["peak_gib"] for n, p in _programs(plan) if n != INFERENCE)
            verdict = "met" if plan["fits"] and peak <= most else f"missed by {peak - most:.1f} GiB"
            lines.append(f"- {text}: {peak:.1f} GiB, {verdict}.")
    for name, label, p in training_steps(results):
        total, hidden = parameter_gathers(p)
        wait = total * (1 - hidden) / p["step_seconds"]
        found = [reason(name, label, what) for what in missed(p)]
        marks |= {r.mark for r in found if r}
        rows.append([
            name, label, f"{100 * hidden:.0f}%, {100 * wait:.1f}%" if total else "none",
            _sums_text(over_fsdp(p), p), _ratio_text(p),
            ", ".join([*(r.mark if r else "unexplained" for r in found),
                       *(f"{what} not judged" for what in unjudged(p))]) or "met"])
    if not rows:
        return ""
    told = "\n".join(f"- **{r.mark}** {r.text}" for r in REASONS if r.mark in marks)
    return "## Against the targets\n\n" + "\n".join([
        *lines,
        "- Every gather of parameters in the layers hidden, no all-reduce (from 4 MiB on) over "
        f"fsdp, tokens at most {CONTEXT_TARGET} of the least that Ulysses sends: the table, and "
        "below it why what is missed is.", "", table(
            ["plan", "step", "gathers in the layers: hidden, wait as part of the step",
             "all-reduces over fsdp", "tokens", "missed"], rows), told, OTHERS])


def _ratio_text(program: dict) -> str:
    ratio = tokens_ratio(program)
    return "not known" if ratio is None else f"{ratio:.2f}" if ratio else ""


def _sums_text(found: list[tuple[str, int, float]], program: dict) -> str:
    """How many, the largest, the most often, and what part of the step all of that kind take."""
    if not found:
        return "none"
    seconds = sum(t["seconds"] for t in program["collectives"]
                  if t["kind"] == "all-reduce" and "fsdp" in t["axes"].split("+"))
    return (f"{len(found)}, up to {max(size for _, size, _ in found)} MiB, up to "
            f"{max(times for *_, times in found):,.0f} times, "
            f"{100 * seconds / program['step_seconds']:.1f}%")


def flags(results: Mapping[str, dict]) -> str:
    """Which plans were compiled with other XLA flags than a run there would have today."""
    unknown, lines = [], []
    for name, result in results.items():
        plan = result["plan"]
        had = plan.get("flags")
        if had is None:
            unknown.append(name)
            continue
        topology = parse_topology(plan["topology"])
        now = compiler_options("auto", topology.chip.kind, topology.hosts)
        other = [f"`{flag}` was {had.get(flag, 'not set')} and is {now.get(flag, 'not set')}"
                 for flag in sorted(had.keys() | now.keys()) if had.get(flag) != now.get(flag)]
        if other:
            lines.append(f"- {name}: {', '.join(other)}.")
    if unknown:
        lines.append("- Compiled before the flags were kept, so perhaps with others than today's: "
                     f"{', '.join(unknown)}.")
    told = lines or ["All were compiled with the flags that a run has today."]
    return "## Flags\n\n" + "\n".join(told) + "\n" if results else ""


def weak_scaling(results: Mapping[str, dict]) -> list[dict[str, Any]]:
    """Per device count of the 8B video stage on H100s: seconds of one update in which every group
    of devices takes as many clips as at the largest size, by part."""
    found = []
    for name, result in results.items():
        if not re.fullmatch(r"seaweed_8b_video_h100_\d+x8", name) or not result["plan"]["fits"]:
            continue
        steps = [p for n, p in _programs(result["plan"]) if n != INFERENCE]
        found.append({
            "devices": result["plan"]["devices"], "mesh": mesh_text(result["plan"]),
            "microbatches": steps[0]["microbatches"],
            "work": sum(p["compute_seconds"] / p["microbatches"] for p in steps),
            "turn": sum((p["exposed_seconds"] - p["exposed_once_seconds"]) / p["microbatches"]
                        for p in steps),
            "once": sum(p["exposed_once_seconds"] for p in steps)})
    found.sort(key=lambda row: row["devices"])
    turns = min((row["microbatches"] for row in found), default=1)
    for row in found:
        row["turns"] = turns
        row["seconds"] = turns * (row["work"] + row["turn"]) + row["once"]
    return found


def scaling_text(rows: list[dict[str, Any]]) -> str:
    first = rows[0]["seconds"]
    return (
        "## Weak scaling, a model\n\n![step time against devices](weak_scaling.svg)\n\n"
        f"One update of the 8B video stage, G and D, with {rows[0]['turns']} clips for every four "
        "H100s whatever their number.\n\n" + table(
            ["H100s", "mesh", "work", "exposed in the turns", "exposed once", "an update",
             "efficiency"],
            [[f"{r['devices']:,}", r["mesh"], seconds_text(r["turns"] * r["work"]),
              seconds_text(r["turns"] * r["turn"]), seconds_text(r["once"]),
              seconds_text(r["seconds"]), f"{100 * first / r['seconds']:.1f}%"] for r in rows])
        + """
Assumed, and not measured:

- products at 71% and attention at 54% of 989 TFLOP/s; norms, gates and other work bound by memory
  take no time of their own in the total (they do hide transfers);
- 450 GB/s one way within a host (NVLink 4), 50 GB/s a GPU between hosts (one 400 Gb/s port each),
  without latency, contention or a slow node; the ports of one group's members on a host add up,
  never beyond NVLink;
- collectives are rings; those over the same mesh axes queue, those over different axes do not
  disturb each other; a transfer runs beside work without slowing it;
- the schedule is the compiled one, so the bytes and what lies between start and end are XLA's;
- data, checkpoints and logging cost nothing.
""")


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Writes the plot; False where matplotlib is missing (the old one stays)."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: the plot is left as it was; pip install 'apt_jax[plots]'")
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "apt_jax"  # the same file from the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    sizes = [row["devices"] for row in rows]
    axes.plot(sizes, [row["seconds"] for row in rows], "o-", label="an update, modelled")
    axes.plot(sizes, [row["turns"] * row["work"] for row in rows], "--", label="its work alone")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.set_ylim(0, 1.25 * max(row["seconds"] for row in rows))
    axes.set_xlabel("H100s")
    axes.set_ylabel(f"seconds, {rows[0]['turns']} clips per four devices")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
