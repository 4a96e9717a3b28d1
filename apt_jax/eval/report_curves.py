"""The report's training curves: which metrics of a run are plotted together, and how."""

import html

from apt_jax.eval.curves import Series, line_plot
from apt_jax.eval.study import Run

# title, y axis logarithmic, [(metric names, first that exists; legend)]
PANELS = (
    ("Loss", True, [(("loss",), "")]),
    ("Adversarial losses", False, [
        (("discriminator/d_gan", "d_gan", "discriminator/d_loss", "d_loss"), "D without penalty"),
        (("generator/g_loss", "g_loss"), "G")]),
    ("D's logits", False, [
        (("discriminator/logit_real", "logit_real"), "real"),
        (("discriminator/logit_fake", "logit_fake"), "generated")]),
    ("R1 penalty, before its weight", True, [
        (("discriminator/r1", "r1"), "R1"), (("discriminator/r2", "r2"), "R2")]),
    ("Gradient norm", True, [
        (("gradient_norm",), "model"), (("discriminator/gradient_norm",), "D"),
        (("generator/gradient_norm",), "G")]),
)


def section(runs: list[Run]) -> str:
    """HTML of all runs: a heading each, then a plot per panel whose metrics the run has."""
    parts = []
    for run in runs:
        plots = [plot for plot in (_panel(run, *panel) for panel in PANELS) if plot]
        body = (f'<div class="plots">{"".join(plots)}</div>' if plots
                else '<p class="missing">no metrics yet</p>')
        parts.append(f"<h3>{html.escape(run.title)}</h3>{body}")
    return "\n".join(parts)


def _panel(run: Run, title: str, log: bool, lines: list) -> str:
    series = []
    for names, legend in lines:
        name = next((n for n in names if any(n in row for row in run.metrics)), None)
        if name is not None:
            rows = [row for row in run.metrics if name in row]
            series.append(Series(legend, [r["step"] for r in rows], [r[name] for r in rows]))
    return line_plot(title, series, log=log) if series else ""
