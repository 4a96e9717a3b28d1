"""Writes report.html into a study's directory: one page without network or scripts.

Shows real pictures, diffusion, consistency and APT side by side on the same prompts and noise,
clips that play, nearest training pictures, loss and logit curves, the table, configs and versions.
What the directory does not have yet is named on the page.
"""

from __future__ import annotations

import argparse

EXAMPLES = """\
  apt-jax report runs/demo
  apt-jax report runs/demo --title "64 px on one H100"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `apt-jax report`."""
    parser.add_argument("directory", metavar="DIR",
                        help="holds summary.json, samples/ and the training runs' folders")
    parser.add_argument("--title", default="One step instead of twenty-five", metavar="TEXT",
                        help="the page's heading")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path; the table first, where there is a summary."""
    from apt_jax.eval.report import write_report
    from apt_jax.eval.study import read_study
    from apt_jax.eval.table import format_table

    summary = read_study(args.directory).summary
    path = write_report(args.directory, args.title)
    table = format_table(summary)
    if table:
        print(f"{table}\n")
    print(f"wrote {path}")
    return 0
