"""Measure the parts beside their peers; on hardware that is not there, compile them and check.

attention   forward and gradient by every attention kernel that this machine can run, and PyTorch's.
block       one block of --config's network, forward and with its gradient, beside the sum of its own
            matrix products and its attention.
forward     one-step generation by the network of --config, as the server runs it.
train       the D and the G step of an adversarial --config, of one sample per copy of its mesh;
            with --as-trained of its batch and accumulation, as apt-jax train runs them.
vae         the VAE's decoder on a sample of --config's size: in causal chunks of 1, 2 and 4 latents,
            and in tiles.
pipeline    UMT5-XXL, one step of --config's network and the VAE: latency, each stage, throughput.
fp8         what eight bits cost in quality, in products, in attention and in both: the FD of
            --checkpoint, the distance from float32 of networks like the 8B preset with the
            checkpoint's statistics, and how much of the approximated R1 penalty is rounding. Of
            several checkpoints, one training from several seeds, the FD may move by less than from
            one to the next.
cpu         the demo's network and one of 100M parameters against the same in PyTorch, eager and
            compiled: forward and training step. Needs torch.

With --device-less nothing runs: attention, block, forward, train, vae and pipeline are compiled for
--topology, and the command fails where a kernel is not in its program, an array has the shape of the
scores, or a product that should be in eight bits is not. Needs pip install 'apt_jax[plan]'; tokamax
too for its kernel.

--json keeps every row as soon as it is measured; the same command goes on where it was stopped, and
measures again what other sources or another config made, and last what failed. A row that a kernel
or a missing package refuses says so; where anything else goes wrong the status is 1, or 75 where it
broke the device for this process and the same command goes on with the others. A row belongs to the
packages that made it; where the device, jax or the driver are others than the file's, a line says so,
all rows are measured again and the old file is kept as NAME.before.json. --profile traces a
few calls of each row and keeps the device's time and its ten costliest kernels in the row.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable

EXAMPLES = """\
  apt-jax bench attention --json docs/results/attention.json
  apt-jax bench attention --device-less --topology h100:1x1
  apt-jax bench attention --device-less --topology v5p:2x2x1 --cases 16k
  apt-jax bench forward --device-less --topology h100:1x8 \
      --config configs/seaweed_8b_video.py --config.mesh.replica=1 --config.mesh.fsdp=1 \
      --config.mesh.context=8
  apt-jax bench block --config configs/seaweed_8b_video.py --weights bfloat16 fp8 --backends tokamax
  apt-jax bench train --config configs/demo_image.py --as-trained --config.train.accumulate=2
  apt-jax bench vae --config configs/seaweed_8b_video.py --decoders 'chunk 1' tiles
  apt-jax bench fp8 --json docs/results/performance/fp8_quality.json
  apt-jax bench fp8 --checkpoint runs/demo-long-0/image runs/demo-long-1/image --kinds both
  apt-jax bench cpu --models demo --seconds 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `apt-jax bench`."""
    add = parser.add_argument
    add("what", choices=("attention", "block", "forward", "train", "vae", "pipeline", "fp8", "cpu"),
        help="what to measure")
    add("--json", metavar="FILE", default="", help="keep the results here")
    add("--seconds", type=float, default=0.0, metavar="S",
        help="how long to time each row (default: attention 2, cpu 20, else 5)")
    add("--rows", type=int, default=0, metavar="N",
        help="block, forward, train, vae, pipeline: leave with status 76 after N new rows where others "
             "are missing; with 1 each row's process is its own, and so is its peak of memory")
    add("--keep-rows", action="store_true",
        help="attention, block, forward, train, vae, pipeline: rows in --json that other sources made "
             "count too; each says which")
    add("--device-less", action="store_true",
        help="all but fp8 and cpu: compile for --topology, run nothing")
    add("--config", metavar="FILE[:ARG]", default="",
        help="block, forward, train, vae, pipeline: a config file")
    add("--topology", default="h100:1x1", metavar="CHIP:SIZES",
        help="what to compile for (default: h100:1x1)")
    add("--cases", nargs="+", default=[], metavar="NAME", help="attention: some of the shapes")
    add("--backends", nargs="+", default=[], metavar="NAME", help="some of the attention kernels")
    add("--weights", nargs="+", default=[], metavar="KIND",
        help="block, forward, train, pipeline: bfloat16 (default), fp8; forward and pipeline: float32")
    add("--steps", nargs="+", default=[], metavar="NAME", help="train: 'D step', 'G step'")
    add("--decoders", nargs="+", default=[], metavar="NAME",
        help="vae, pipeline: 'chunk 1', 'chunk 2', 'chunk 4', tiles (default: vae all, pipeline the "
             "first)")
    add("--no-peers", action="store_true", help="leave out PyTorch's models")
    add("--as-trained", action="store_true",
        help="train: the config's batch (of clips, where it trains on them) and accumulation, "
             "without PyTorch's step, which has one sample")
    add("--profile", metavar="DIR", default="",
        help="all but fp8: trace a few calls of each row (cpu: of ours) into a folder of DIR")
    add("--checkpoint", nargs="+", default=["bundled:base"], metavar="PATH",
        help="fp8: a trained generator, or several of one training from different seeds")
    add("--kinds", nargs="+", default=[], metavar="NAME",
        help="fp8: what is in eight bits: products, attention, both, 'products but last', 'both but "
             "last' (default: each in turn)")
    add("--mode", default="", choices=("one_step", "two_step", "euler"),
        help="fp8: how the FD's pictures are drawn (default: euler for bundled:base, else one_step)")
    add("--seeds", type=int, default=4, metavar="N", help="fp8: seeds of the noise (default: 4)")
    add("--count", type=int, default=0, metavar="N",
        help="fp8: pictures of each FD (default: 0, one a caption)")
    add("--depths", type=int, nargs="+", default=[4, 12, 36], metavar="N",
        help="fp8: layers of the networks whose distance is measured (default: 4 12 36)")
    add("--models", nargs="+", default=[], metavar="NAME", help="cpu: some of the networks")
    add("--no-compile", action="store_true", help="cpu: leave out torch.compile")


# Statuses beside 0 and 1. The same command goes on: with the others where a row broke the device for its
# process ("try again", as sysexits.h has it), with the next where as many as --rows asks for are made.
AGAIN, MORE = 75, 76
WHOLE = ("block", "forward", "train", "vae", "pipeline")
# flag -> the benches that it says something to
MEANT_FOR = {
    "device_less": ("attention", *WHOLE), "topology": ("attention", *WHOLE),
    "profile": ("attention", *WHOLE, "cpu"), "config": WHOLE, "rows": WHOLE,
    "keep_rows": ("attention", *WHOLE),
    "weights": ("block", "forward", "train", "pipeline"),
    "backends": ("attention", "block", "forward", "train", "pipeline"), "cases": ("attention",),
    "steps": ("train",), "decoders": ("vae", "pipeline"),
    "no_peers": ("block", "forward", "train", "vae"), "as_trained": ("train",),
    "checkpoint": ("fp8",), "kinds": ("fp8",), "mode": ("fp8",), "seeds": ("fp8",),
    "count": ("fp8",), "depths": ("fp8",), "seconds": ("attention", *WHOLE, "cpu"),
    "models": ("cpu",), "no_compile": ("cpu",)}


def run(args: argparse.Namespace) -> int:
    """Prints a line per row; status 1 where a device-less program or a gate does not pass."""
    _check(args)
    if args.what == "cpu":
        return _cpu(args)
    if args.what == "fp8":
        return _fp8(args)
    if args.device_less:
        return _device_less(args)
    return _attention(args) if args.what == "attention" else _timed(args)


def _check(args: argparse.Namespace) -> None:
    """UserError for numbers and files that no bench can use."""
    from apt_jax.errors import UserError

    usual = argparse.ArgumentParser()
    add_arguments(usual)
    for name, benches in MEANT_FOR.items():
        if args.what not in benches and getattr(args, name) != usual.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for apt-jax bench {', '.join(benches)}, "
                            f"not {args.what}; leave it out")
    if args.overrides and args.what not in WHOLE:
        raise UserError(f"{args.overrides[0].partition('=')[0]}: apt-jax bench {args.what} reads no "
                        "config; leave it out")
    if not 0 <= args.seconds < float("inf"):
        raise UserError(f"--seconds {args.seconds:g} is no time; give how long to time each row")
    for name in ("seconds", "profile"):
        if args.device_less and getattr(args, name):
            raise UserError(f"--{name}: nothing runs with --device-less; leave one of them out")
    if args.rows < 0 or (args.rows and (args.device_less or not args.json)):
        raise UserError(f"--rows {args.rows}: that many rows are timed and kept in --json, without "
                        "--device-less; give 1 or more and a file")
    if min(args.depths) < 1:
        raise UserError(f"--depths {min(args.depths)} is no network; give numbers of layers, 1 or more")
    if args.count < 0:
        raise UserError(f"--count {args.count} is no number of pictures; give 0 for one a caption")
    if args.what == "fp8" and args.seeds < 2:
        raise UserError(f"--seeds {args.seeds}: how far a seed moves the FD takes two; give 2 or more")
    if args.json:
        path = _path(args)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise PermissionError(0, "nothing can be written there")
        except OSError as error:
            raise UserError(f"--json {path}: {error.strerror}; name a file that can be written"
                            ) from None


def _config(args: argparse.Namespace, backend: str = ""):
    """The config of --config with its overrides, and this attention kernel."""
    from apt_jax.config import load_config, validate
    from apt_jax.errors import UserError

    if not args.config:
        raise UserError(f"apt-jax bench {args.what} needs --config, for example "
                        "--config configs/seaweed_8b_video.py")
    chosen = [f"--config.model.attention={backend}"] if backend else []
    return validate(load_config(args.config, [*args.overrides, *chosen]))


def _plan(args: argparse.Namespace, devices, backends):
    from apt_jax.bench.cases import INFERENCE_ONLY
    from apt_jax.bench.pipeline import DECODERS, check_latents
    from apt_jax.bench.programs import STEPS, check_overrides, check_switches
    from apt_jax.bench.run import Plan
    from apt_jax.errors import UserError
    from apt_jax.kernels.choice import BACKENDS
    from apt_jax.serve import WEIGHTS

    config = _config(args)  # complain of it before anything is compiled
    check_switches(args.overrides)
    if args.what == "train":
        check_overrides(args.overrides, args.as_trained)
    _some(args.backends, BACKENDS, "--backends")
    for name in set(args.backends) & set(INFERENCE_ONLY):
        if args.what == "train":
            raise UserError(f"--backends {name!r} is for inference and has no gradient; leave it out")
    decoders = _some(args.decoders, DECODERS, "--decoders")
    if args.what in ("vae", "pipeline"):
        check_latents(config)
    kinds = WEIGHTS[1:] if args.what in ("forward", "pipeline") else ("bfloat16", "fp8")
    return Plan(args.what, lambda backend: _config(args, backend), devices, backends,
                _some(args.weights or ["bfloat16"], kinds, "--weights"),
                steps=_some(args.steps, STEPS, "--steps"),
                decoders=decoders, overrides=args.overrides, most=args.rows,
                seconds=args.seconds or 5.0, peers=not args.no_peers,
                as_trained=args.as_trained, profile=args.profile)


def _device_less(args: argparse.Namespace) -> int:
    from apt_jax.plan.devices import describe, prepare_environment

    prepare_environment()
    from apt_jax.bench import run
    from apt_jax.bench.cases import BACKENDS_OF, CASES
    from apt_jax.bench.device_less import compile_all, table
    from apt_jax.bench.report import Results
    from apt_jax.plan.chips import parse_topology

    topology = parse_topology(args.topology)
    if args.what != "attention":
        _config(args)
    devices = describe(topology)
    backends = _some(args.backends, BACKENDS_OF[topology.chip.kind], "--backends")
    results = Results(_path(args), f"{topology.text} (compiled only)", keep=args.keep_rows)
    if args.what == "attention":
        def keep(row) -> None:
            results.add(f"{row.case}/{row.part}/{row.backend}",
                        {**dataclasses.asdict(row), "passes": row.passes})

        rows = compile_all([CASES[name] for name in _some(args.cases, CASES, "--cases")], backends,
                           devices[0], keep)
    else:
        rows = [run.as_compiled(row) for row in run.compile_all(
            _plan(args, devices, backends), topology.text, results)]
    print(table(rows))
    failed = sum(not row.passes for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} programs pass for {devices[0].device_kind}")
    return 1 if failed else 0


def _attention(args: argparse.Namespace) -> int:
    _share_memory("torch" in (args.backends or ["torch"]))
    import jax

    from apt_jax.bench import attention
    from apt_jax.bench.cases import CASES
    from apt_jax.bench.report import Results

    cases = [CASES[name] for name in _some(args.cases, CASES, "--cases")]
    backends = _some(args.backends, attention.default_backends(), "--backends")
    results = Results(_path(args), jax.devices()[0].device_kind, keep=args.keep_rows)
    return _status(lambda: attention.run(cases, backends, results, seconds=args.seconds or 2.0,
                                         profile=args.profile))


def _status(make: Callable[[], int]) -> int:
    """0, 1 where rows failed, AGAIN or MORE."""
    from apt_jax.bench.rows import DeviceLost, Enough

    try:
        return 1 if make() else 0
    except Enough:
        return MORE
    except DeviceLost as error:
        print(f"apt-jax bench: {error}; the same command goes on with the others")
        return AGAIN


def _share_memory(beside: bool) -> None:
    """Before jax starts: it may take nearly all of a GPU's memory (of its own it stops at three
    quarters), beside PyTorch as it needs it and alone at once. What it takes piece by piece leaves
    gaps: a training state of 21 GiB held 32 of them, and no 44 in one piece were left of 80."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false" if beside else "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")


def _timed(args: argparse.Namespace) -> int:
    _share_memory(args.what != "pipeline" and not (args.no_peers or args.as_trained))
    import jax

    from apt_jax.bench.report import Results
    from apt_jax.bench.run import time_all

    backends = args.backends or ["auto"]
    plan = _plan(args, jax.devices(), backends)
    kind = jax.devices()[0].device_kind
    results = Results(_path(args), kind, keep=args.keep_rows)
    return _status(lambda: time_all(plan, kind, results))


def _fp8(args: argparse.Namespace) -> int:
    import jax

    from apt_jax import api
    from apt_jax.bench import quality
    from apt_jax.bench.report import Results

    results = Results(_path(args), jax.devices()[0].device_kind)  # "cpu" of a CPU
    weights = {checkpoint: quality.digest(api.load(checkpoint)) for checkpoint in args.checkpoint}
    kinds = _some(args.kinds, quality.KINDS, "--kinds")
    mode = args.mode or ("euler" if args.checkpoint == ["bundled:base"] else "one_step")
    for checkpoint in args.checkpoint:
        quality.distance_rows(checkpoint, results, depths=args.depths, seeds=range(2), kinds=kinds)
        if "products" in kinds:
            quality.penalty_rows(checkpoint, results)
        quality.fd_rows(checkpoint, results, seeds=range(args.seeds), count=args.count, mode=mode,
                        kinds=kinds)
    good = quality.report(weights, results, mode=mode, count=args.count, kinds=kinds)
    return 0 if good else 1


def _cpu(args: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever else the machine has
    from apt_jax.bench import cpu
    from apt_jax.bench.report import Results

    if os.getloadavg()[0] > 0.5:
        print("apt-jax bench: other processes are using this machine; PyTorch's threads wait for "
              "each other by spinning and suffer most, so these ratios say little")
    models = _some(args.models, cpu.CASES, "--models")
    names = [n for n in cpu.CONTENDERS if n != "torch.compile" or not args.no_compile]
    results = Results(_path(args), jax.devices()[0].device_kind)
    cpu.run(models, names, results, seconds=args.seconds or 20.0, profile=args.profile)
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
