"""Trains one stage in a run folder; the same command continues a run that was stopped.

Ctrl-C or SIGTERM, on any of several processes, finishes the step, saves and leaves; a single process
that still compiles its first step leaves at once. A finished run returns at once, or is refused where
its settings were others; an unfinished one goes on with other settings and a warning of each.
"""

from __future__ import annotations

import argparse

EXAMPLES = """\
  apt-jax train --config configs/demo_image.py --workdir runs/image
  apt-jax train --config configs/demo_image.py --workdir runs/no_r1 \\
      --config.objective.adversarial.r1=false --config.init.generator=runs/consistency
  apt-jax train --config configs/emoji_64.py:pretrain --workdir runs/emoji_64/pretrain
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `apt-jax train`."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]",
                        help="config file with get_config(), e.g. configs/demo_image.py; an ARG goes to "
                             "get_config(ARG), e.g. configs/emoji_64.py:image")
    parser.add_argument("--workdir", required=True, metavar="DIR",
                        help="run folder; made if missing, continued if it holds checkpoints")
    parser.add_argument("--quiet", action="store_true", help="no progress output")
    several = parser.add_argument_group(
        "several processes", "found without flags under Slurm, in a JobSet and from "
        "launch/local.py; all processes take the same command otherwise")
    several.add_argument("--coordinator", default="", metavar="HOST:PORT",
                         help="where process 0 listens")
    several.add_argument("--processes", type=int, default=0, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, default=-1, metavar="I",
                         help="which this is, from 0")
    several.add_argument("--preempted-status", type=int, default=0, metavar="N",
                         help="exit status after a signal, when the state is saved and steps are "
                              "left (default: 0); launch/ uses 75 to tell the scheduler that this "
                              "is not the end")
    several.add_argument("--distributed", action="store_true",
                         help="let jax find the others, on TPU VMs")


def run(args: argparse.Namespace) -> int:
    """Trains; after a signal, when the state is saved, the status is --preempted-status."""
    import jax

    from apt_jax.cli.ending import leave_job, leave_with
    from apt_jax.config import load_config, validate
    from apt_jax.train.distributed import find_job, start
    from apt_jax.train.loop import train

    config = validate(load_config(args.config, args.overrides))
    start(find_job(coordinator=args.coordinator, processes=args.processes, process=args.process,
                   automatic=args.distributed))
    try:
        summary = train(config, args.workdir, quiet=args.quiet,
                        leave=lambda: leave_with(args.preempted_status))
    except BaseException as error:
        if jax.distributed.is_initialized():
            leave_job(error)
        raise
    if summary["status"] == "complete" and jax.process_index() == 0:
        print(f"{config.name}: {summary['step']} steps in {summary['seconds']:.0f} s of training, "
              f"in {summary['workdir']}")
    return args.preempted_status if summary["status"] == "preempted" else 0
