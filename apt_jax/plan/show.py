"""A plan as text."""

from __future__ import annotations

from apt_jax.eval.table import lay_out
from apt_jax.plan.chips import GIB
from apt_jax.plan.run import RESERVE, Plan

SHOWN = 6  # exposed collectives of a program; the JSON has all


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def format_plan(plan: Plan) -> str:
    """Tables of memory, work and traffic per device, the notes, and the verdict."""
    chip = plan.topology.chip
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "1 device"
    head = [
        f"{plan.topology.text}: {plan.topology.devices} devices as {mesh}; "
        f"{plan.batch:,} samples of {plan.tokens:,} tokens an update, "
        f"{plan.microbatch:,} at a time",
        ", ".join(f"{name} {count:,} parameters" for name, count in plan.parameters.items())
        + f"; attention: {plan.attention}",
    ]
    names = [p.name for p in plan.programs]
    parts = list(dict.fromkeys(part for p in plan.programs for part in p.parts))
    memory = [[part] + [_gib(p.parts[part]) if part in p.parts else "" for p in plan.programs]
              for part in parts]
    memory += [
        ["results that are not updated in place"]
        + [_gib(p.outputs - p.aliased) for p in plan.programs],
        ["activations and temporaries"] + [_gib(p.temporaries) for p in plan.programs],
        ["peak"] + [_gib(p.peak) for p in plan.programs],
    ]
    work = [
        ["model TFLOP, all devices"] + [f"{p.flops.total / 1e12:,.1f}" for p in plan.programs],
        ["  of which attention"] + [f"{p.flops.attention / 1e12:,.1f}" for p in plan.programs],
        ["forward TFLOP a sample"]
        + [f"{p.flops.forward / p.samples / 1e12:,.2f}" for p in plan.programs],
        ["executed TFLOP (recomputation)"]
        + [f"{p.executed.total / 1e12:,.1f}" for p in plan.programs],
        ["floor at peak rate"] + [_seconds(p.floor) for p in plan.programs],
        ["modelled products"] + [_seconds(p.compute) for p in plan.programs],
        ["modelled exposed traffic"] + [_seconds(p.exposed) for p in plan.programs],
        ["modelled time"] + [_seconds(p.step) for p in plan.programs],
    ]
    if any(p.context_minimum != 0 for p in plan.programs):
        work.append(["tokens sent / least possible"] + [
            "not known" if p.context_minimum is None
            else f"{p.context_bytes / p.context_minimum:.2f}" if p.context_minimum else ""
            for p in plan.programs])
    traffic = [
        [p.name, t.kind, t.axes, t.dtype, f"{t.count:g}", f"{t.wire / GIB:.2f}",
         _seconds(t.seconds), f"{100 * t.overlapped:.0f}%"]
        for p in plan.programs for t in p.traffic
    ]
    blocks = ["\n".join(head), lay_out(["GiB per device", *names], memory),
              lay_out(["work", *names], work)]
    if traffic:
        blocks.append(lay_out(["traffic per device", "kind", "axes", "dtype", "count", "GiB sent",
                               "time on the link", "hidden"], traffic))
    waits = [[p.name, c.kind, c.axes, f"{c.bytes / 2**20:.1f}", f"{c.times:g}",
              _seconds(c.seconds), f"{100 * c.hidden:.0f}%"]
             for p in plan.programs for c in p.exposed_steady[:SHOWN]]
    if waits:
        blocks.append(lay_out(["exposed in the layers", "kind", "axes", "MiB", "times", "one takes",
                               "hidden"], waits))
    notes = [*plan.notes, *(f"{p.name}: {note}" for p in plan.programs for note in p.notes)]
    if notes:
        shown = notes[:12] + ([f"and {len(notes) - 12} more"] if len(notes) > 12 else [])
        blocks.append("notes\n" + "\n".join(f"  {note}" for note in shown))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    refused = [f"{p.name}: the compiler found no room: {p.refused}"
               for p in plan.programs if p.refused]
    if refused:
        blocks.append("\n".join(refused))
    text = (f"{verdict}: {_gib(plan.peak)} GiB at the peak, {_gib(plan.usable)} of the "
            f"{chip.name}'s {_gib(chip.memory)} usable ({100 * RESERVE:.0f}% kept for driver and "
            "allocator)")
    if not plan.fits and plan.remedy is not None:
        text += f"\nit would fit with {plan.remedy}" if plan.remedy else (
            "\nno one or two changes were found that make it fit; take more devices")
    blocks.append(text)
    return "\n\n".join(blocks)


def format_sweep(results: list, devices: int) -> str:
    """One line a mesh and policy, those that fit first."""
    rows = []
    for label, remat, found in results:
        label = f"{label}, remat {remat}"
        if isinstance(found, str):
            rows.append([label, "", "", "", "", f"not possible: {found}"])
            continue
        rows.append([label, str(found.batch), _gib(found.peak), _seconds(found.step),
                     f"{found.batch / found.step:.3f}",
                     "fits" if found.fits else "does not fit"])
    return lay_out([f"{devices} devices", "samples", "peak GiB", "an update, modelled",
                    "samples/s", ""], rows)
