"""Measure the parts beside their peers; on hardware that is not there, compile them and check.

attention   forward and gradient by every attention kernel that this machine can run, and PyTorch's.
            With --device-less every kernel is compiled for --topology instead, and the command fails
            where a kernel is not in its program or an array is as large as the scores. Needs
            pip install 'apt_jax[plan]'; tokamax too for its kernel.
forward     one-step generation by the network of --config: with --device-less compiled for
            --topology by every kernel, which must be in the program once per layer; otherwise timed
            on this machine.
train       the G and the D step of an adversarial --config, with --device-less only.
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
  apt-jax bench forward --device-less --topology h100:1x8 \
      --config configs/seaweed_8b_video.py --config.mesh.replica=1 --config.mesh.fsdp=1 \
      --config.mesh.context=8
  apt-jax bench cpu --models demo --seconds 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `apt-jax bench`."""
    add = parser.add_argument
    add("what", choices=("attention", "forward", "train", "cpu"), help="what to measure")
    add("--json", metavar="FILE", default="", help="keep the results here")
    add("--seconds", type=float, default=0.0, metavar="S",
        help="how long to time each row (default: 2, cpu: 20)")
    add("--device-less", action="store_true", help="compile for --topology, run nothing")
    add("--config", metavar="FILE[:ARG]", default="", help="forward, train: a config file")
    add("--topology", default="h100:1x1", metavar="CHIP:SIZES",
        help="what to compile for (default: h100:1x1)")
    add("--cases", nargs="+", default=[], metavar="NAME", help="attention: some of the shapes")
    add("--backends", nargs="+", default=[], metavar="NAME", help="some of the attention kernels")
    add("--models", nargs="+", default=[], metavar="NAME", help="cpu: some of the networks")
    add("--no-compile", action="store_true", help="cpu: leave out torch.compile")


def run(args: argparse.Namespace) -> int:
    """Prints a line per row; status 1 where a device-less program does not pass."""
    if args.what == "cpu":
        return _cpu(args)
    if args.device_less:
        return _device_less(args)
    return _attention(args) if args.what == "attention" else _forward(args)


def _config(args: argparse.Namespace, backend: str = ""):
    """The config of --config with its overrides, and this attention kernel."""
    from apt_jax.config import load_config, validate
    from apt_jax.errors import UserError

    if not args.config:
        raise UserError(f"apt-jax bench {args.what} needs --config, for example "
                        "--config configs/seaweed_8b_video.py")
    chosen = [f"--config.model.attention={backend}"] if backend else []
    return validate(load_config(args.config, [*args.overrides, *chosen]))


def _device_less(args: argparse.Namespace) -> int:
    from apt_jax.plan.devices import describe, prepare_environment

    prepare_environment()
    from apt_jax.bench import programs
    from apt_jax.bench.cases import BACKENDS_OF, CASES
    from apt_jax.bench.device_less import compile_all, table
    from apt_jax.bench.report import Results
    from apt_jax.plan.chips import parse_topology

    topology = parse_topology(args.topology)
    if args.what != "attention":
        _config(args)  # complain of it before anything is compiled
    devices = describe(topology)
    device = devices[0]
    backends = _some(args.backends, BACKENDS_OF[topology.chip.kind], "--backends")
    results = Results(None, f"{topology.text} (compiled only)")
    results.path = _path(args)

    def keep(row) -> None:
        results.add(f"{row.case}/{row.part}/{row.backend}",
                    {**dataclasses.asdict(row), "passes": row.passes})

    if args.what == "attention":
        rows = compile_all([CASES[name] for name in _some(args.cases, CASES, "--cases")], backends,
                           device, keep)
    else:
        rows = programs.compile_all(args.what, lambda backend: _config(args, backend), backends,
                                    devices, topology.text, keep)
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


def _forward(args: argparse.Namespace) -> int:
    import jax

    from apt_jax.bench import programs
    from apt_jax.bench.attention import line
    from apt_jax.bench.report import Results
    from apt_jax.errors import UserError

    if args.what == "train":
        raise UserError("bench train runs nothing yet; add --device-less to compile the steps")
    kind = jax.devices()[0].device_kind
    results = Results(_path(args), kind)
    for backend in args.backends or ["auto"]:
        config = _config(args, backend)
        (program,) = programs.build("forward", config, jax.devices())
        name = f"{config.name}/forward/{backend}"
        if name not in results:
            results.add(name, programs.time_program(program, kind, args.seconds or 10.0))
            print(line(name, results.rows[name]))
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
