"""Measure the parts beside their peers; on hardware that is not there, compile them and check.

attention   forward and gradient by every attention kernel that this machine can run, and PyTorch's.
            With --device-less every kernel is compiled for --topology instead, and the command fails
            where a kernel is not in its program or an array is as large as the scores. Needs
            pip install 'apt_jax[plan]'; tokamax too for its kernel.
cpu         the demo's network and one of 100M parameters against the same in PyTorch, eager and
            compiled: forward and training step. Needs torch.

--json keeps every row as soon as it is measured; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

EXAMPLES = """\
  apt-jax bench attention --json docs/results/attention.json
  apt-jax bench attention --device-less --topology h100:1x1
  apt-jax bench attention --device-less --topology v5p:2x2x1 --cases 16k
  apt-jax bench cpu --models demo --seconds 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `apt-jax bench`."""
    add = parser.add_argument
    add("what", choices=("attention", "cpu"), help="what to measure")
    add("--json", metavar="FILE", default="", help="keep the results here")
    add("--seconds", type=float, default=0.0, metavar="S",
        help="how long to time each row (default: 2, cpu: 20)")
    add("--device-less", action="store_true", help="attention: compile for --topology, run nothing")
    add("--topology", default="h100:1x1", metavar="CHIP:SIZES",
        help="what to compile for (default: h100:1x1)")
    add("--cases", nargs="+", default=[], metavar="NAME", help="attention: some of the shapes")
    add("--backends", nargs="+", default=[], metavar="NAME", help="attention: some of the kernels")
    add("--models", nargs="+", default=[], metavar="NAME", help="cpu: some of the networks")
    add("--no-compile", action="store_true", help="cpu: leave out torch.compile")


def run(args: argparse.Namespace) -> int:
    """Prints a line per row; status 1 where a device-less program does not pass."""
    if args.what == "cpu":
        return _cpu(args)
    return _device_less(args) if args.device_less else _attention(args)


def _device_less(args: argparse.Namespace) -> int:
    from apt_jax.plan.devices import describe, prepare_environment

    prepare_environment()
    from apt_jax.bench.cases import BACKENDS_OF, CASES
    from apt_jax.bench.device_less import compile_all, table
    from apt_jax.bench.report import Results
    from apt_jax.plan.chips import parse_topology

    topology = parse_topology(args.topology)
    device = describe(topology)[0]
    backends = _some(args.backends, BACKENDS_OF[topology.chip.kind], "--backends")
    results = Results(None, f"{topology.text} (compiled only)")
    results.path = _path(args)

    def keep(row) -> None:
        results.add(f"{row.case}/{row.part}/{row.backend}",
                    {**dataclasses.asdict(row), "passes": row.passes})

    rows = compile_all([CASES[name] for name in _some(args.cases, CASES, "--cases")], backends,
                       device, keep)
    print(table(rows))
    failed = sum(not row.passes for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} programs pass for {device.device_kind}")
    return 1 if failed else 0


def _attention(args: argparse.Namespace) -> int:
    import jax

    from apt_jax.bench import attention
    from apt_jax.bench.cases import CASES
    from apt_jax.bench.report import Results

    cases = [CASES[name] for name in _some(args.cases, CASES, "--cases")]
    backends = _some(args.backends, attention.default_backends(), "--backends")
    results = Results(_path(args), jax.devices()[0].device_kind)
    attention.run(cases, backends, results, seconds=args.seconds or 2.0)
    return 0


def _cpu(args: argparse.Namespace) -> int:
    from apt_jax.bench import cpu
    from apt_jax.bench.report import Results

    if os.getloadavg()[0] > 0.5:
        print("apt-jax bench: other processes are using this machine; PyTorch's threads wait for "
              "each other by spinning and suffer most, so these ratios say little")
    models = _some(args.models, cpu.CASES, "--models")
    names = [n for n in cpu.CONTENDERS if n != "torch.compile" or not args.no_compile]
    cpu.run(models, names, Results(_path(args), "cpu"), seconds=args.seconds or 20.0)
    return 0


def _path(args: argparse.Namespace):
    from pathlib import Path

    return Path(args.json) if args.json else None


def _some(chosen, known, flag: str) -> list[str]:
    """The chosen names, all where none is; UserError for one that is not known."""
    from apt_jax.config.load import nearest
    from apt_jax.errors import UserError

    for name in chosen:
        if name not in known:
            raise UserError(f"{flag} {name!r} is unknown{nearest(name, list(known))}; known: "
                            f"{', '.join(known)}")
    return list(chosen) or list(known)
