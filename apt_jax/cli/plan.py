"""Compile a config's programs for devices that are not there, and say what they need.

The G step, the D step (or the step of the config's stage) and one-step inference are compiled by
the real XLA for the topology, with the batch and the microbatches that training would have there.
The tables show, per device: parameters, optimiser state, temporaries and the peak against the chip's
memory; model FLOPs and the time they take at the chip's peak rate; the collectives by kind, axes
and bytes, and which part of them compute hides. Times are models, for comparing; memory and traffic are
the compiler's own. Nothing is trained and no accelerator is touched.

Topologies: h100:HOSTSxGPUS (h100:1x8, h100:16x8), h200 likewise, v4:4x4x4, v5p:4x4x8, v5e:4x4,
v6e:16x16. Needs `pip install 'apt_jax[plan]'` (libtpu for TPUs, jax's CUDA plugin for GPUs).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """\
  apt-jax plan --config configs/seaweed_8b_video.py --topology h100:1x8
  apt-jax plan --config configs/seaweed_8b_video.py --topology v5p:4x4x8 --json plan.json
  apt-jax plan --config configs/emoji_64.py:image --topology h100:1x1 --config.model.remat=none
  apt-jax plan --config configs/seaweed_8b_image.py --topology h100:8x8 --sweep
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `apt-jax plan`."""
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:ARG]", help="a config file")
    add("--topology", required=True, metavar="CHIP:SIZES", help="devices to compile for")
    add("--json", metavar="FILE", default="",
        help="write everything as JSON too (with --sweep the rows until then, after each)")
    add("--hlo", metavar="DIR", default="", help="keep the compiled programs' text in this folder")
    add("--reuse", action="store_true",
        help="with --hlo: read the programs that lie there instead of compiling them again, but for those "
             "of other XLA flags; the config and the topology must be those they were compiled for")
    add("--no-inference", action="store_true", help="leave out one-step inference")
    add("--no-remedy", action="store_true",
        help="do not look for a change that makes it fit, which compiles it again and again")
    add("--sweep", action="store_true",
        help="try mesh shapes and remat policies, rank those that fit by modelled time")
    add("--remats", nargs="+", default=["full", "attention", "none"], metavar="NAME",
        help="policies that --sweep tries (default: full attention none)")
    add("--flags", metavar="FILE", default="auto",
        help="XLA flags to compile with: a file, 'none', or 'auto' for the platform's own, as "
             "the launch scripts set them on so many hosts (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Compile, print the tables; status 0 when it fits, 1 when it does not."""
    from apt_jax.errors import UserError
    from apt_jax.parallel.flags import VARIABLES, compiler_options
    from apt_jax.plan.devices import describe, prepare_environment

    if args.sweep and args.hlo:
        raise UserError("--hlo keeps the programs of one plan, not of a --sweep; leave one of the "
                        "two out")
    if args.reuse and not args.hlo:
        raise UserError("--reuse reads kept programs; name their folder with --hlo DIR")
    given = {name: os.environ[name] for name in VARIABLES.values() if os.environ.get(name)}
    prepare_environment(unrun=True)
    from apt_jax.config import load_config, validate
    from apt_jax.config.schema import REMATS
    from apt_jax.parallel.flags.options import known_options
    from apt_jax.plan import run as planning
    from apt_jax.plan.chips import parse_topology
    from apt_jax.plan.kept import Kept
    from apt_jax.plan.show import format_plan, format_sweep

    if strange := [name for name in args.remats if name not in REMATS]:
        raise UserError(f"--remats has no {strange[0]!r}; use {', '.join(REMATS)}")
    topology = parse_topology(args.topology)
    config = validate(load_config(args.config, args.overrides))
    kept = Kept(Path(args.hlo), args.reuse) if args.hlo else None
    if kept:
        kept.check()
    if args.json:
        _check(Path(args.json))

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # Asked once, for all plans of a sweep and of a search.
    options = known_options(compiler_options(args.flags, topology.chip.kind, topology.hosts),
                            describe(topology)[0], tell)

    def plain(found: planning.Plan) -> dict[str, Any]:
        """Its JSON, with the flags that the user's environment adds."""
        return found.to_json() | ({"environment": given} if given else {})

    def rows(results: list[planning.Row]) -> list[dict[str, Any]]:
        return [{"label": label, "remat": remat, **(
            {"error": found} if isinstance(found, str) else plain(found))}
            for label, remat, found in results]

    def keep(results: list[planning.Row]) -> None:
        if args.json:
            try:
                _write(Path(args.json), rows(results))
            except UserError as error:
                tell(f"plan: {error}")  # the table at the end is not lost with the file

    if args.sweep:
        results = planning.sweep(config, topology, tuple(args.remats), tell, keep, options=options)
        print(format_sweep(results, topology.devices))
        value: Any = rows(results)
        fits = any(not isinstance(found, str) and found.fits for *_, found in results)
    else:
        found = planning.plan(config, topology, inference=not args.no_inference, options=options,
                              kept=kept, tell=tell)
        if not found.fits and not args.no_remedy:
            import dataclasses

            tell("looking for a change that makes it fit")
            found = dataclasses.replace(found, remedy=planning.find_remedy(
                config, topology, found, options=options, tell=tell))
        print(format_plan(found))
        value, fits = plain(found), found.fits
    if args.json:
        _write(Path(args.json), value)
    return 0 if fits else 1


def _check(path: Path) -> None:
    """UserError where the file cannot be written: asked before anything is compiled. Nothing is left
    there but its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def _write(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> Exception:
    from apt_jax.errors import UserError

    return UserError(f"cannot write {path} ({error.strerror}); give a file in a folder that you may "
                     "write to")
