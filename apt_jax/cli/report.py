"""Writes report.html into a folder: one page without network or scripts.

Of a study (make demo) it shows real pictures, diffusion, consistency and APT side by side on the
same prompts and noise, clips that play, nearest training pictures, loss and logit curves, the table,
configs and versions; of a run's folder its curves and evaluations; of a folder that `apt-jax
evaluate` wrote its table and samples. What a study does not have yet is named on the page.
"""

from __future__ import annotations

import argparse

EXAMPLES = """\
  apt-jax report runs/demo
  apt-jax report runs/image
  apt-jax report runs/evaluation --title "64 px on one H100"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `apt-jax report`."""
    parser.add_argument("directory", metavar="DIR",
                        help="what make demo, apt-jax train or apt-jax evaluate wrote into")
    parser.add_argument("--title", default="", metavar="TEXT",
                        help="the page's heading (default: 'One step instead of twenty-five' for "
                             "a study, else the folder's name)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path; the tables first, where there are any."""
    from apt_jax.eval.report import write_report
    from apt_jax.eval.study import read_study
    from apt_jax.eval.table import format_result, format_table

    path = write_report(args.directory, args.title)
    study = read_study(args.directory)
    tables = [format_table(study.summary)] + [
        (f"{found.name}\n\n" if len(study.evaluations) > 1 else "")
        + format_result(found.result, found.label) for found in study.evaluations]
    for table in filter(None, tables):
        print(f"{table}\n")
    print(f"wrote {path}")
    return 0
