"""Means and spread over the seeds of a study, e.g. of `make demo-long SEED=0`, `SEED=1`, `SEED=2`.

    python launch/seeds.py runs/demo-long-0 runs/demo-long-1 runs/demo-long-2 --out docs/results/demo-long

Prints the table. With --out it writes spread.json and table.txt there, each run's summary as
NAME.json, and the pictures of the first run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="work directories of finished runs")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)

    from apt_jax.errors import UserError
    from apt_jax.eval.spread import format_spread, spread
    from apt_jax.eval.study import read_summary

    try:
        summaries = {run.resolve().name: read_summary(run) for run in args.runs}
        if len(summaries) < len(args.runs):
            raise UserError("two of the runs have the same name; give each run once")
        found = spread(summaries)
    except UserError as error:
        print(f"seeds: {error}", file=sys.stderr)
        return 2
    print(format_spread(found))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "spread.json").write_text(json.dumps(found, indent=2) + "\n")
        (args.out / "table.txt").write_text(format_spread(found) + "\n")
        for name, summary in summaries.items():
            (args.out / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
        for picture in ("image.png", "video.webp"):
            if (args.runs[0] / picture).is_file():
                shutil.copyfile(args.runs[0] / picture, args.out / picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
