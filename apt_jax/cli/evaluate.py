"""Measures a generator, or a file of samples, against real data.

FD-MobileNetV2 and sharpness on training captions, beside what real data scores against itself; KID
with a bootstrap interval on held-out captions. Several --guidance values are a sweep: the best is
reported and every value is in the JSON. Writes evaluation.json and samples.npz into --out, of a
sweep after every value. A part that the data are too few for is null, and a line says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from apt_jax.errors import UserError, disk_errors

EXAMPLES = """\
  apt-jax evaluate --checkpoint runs/image --out runs/image/evaluation
  apt-jax evaluate --checkpoint bundled:base --mode euler --guidance 1 --guidance 2 --guidance 4
  apt-jax evaluate --checkpoint runs/video --frames 4 --mode two_step --weights raw
  apt-jax evaluate --samples runs/demo/samples/image/apt_1.npz
"""

# Flags that say how samples are drawn, and their defaults; with --samples nothing is drawn.
DRAWING = {"mode": "one_step", "steps": None, "guidance": None, "time": None, "fresh_noise": None,
           "weights": "ema", "base": None, "held_out": "holdout", "frames": None, "height": None,
           "width": None, "count": 0, "seed": 0, "batch": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `apt-jax evaluate`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="PATH",
                      help="a run folder, a weights folder, or bundled:base")
    what.add_argument("--samples", metavar="FILE",
                      help="measure this npz (frames uint8 [N, F, H, W, 3], captions) instead; "
                           "only --data, --split, --dim and --out go with it")
    parser.add_argument("--mode", choices=("one_step", "two_step", "euler"),
                        help="how to sample (default: one_step)")
    parser.add_argument("--steps", type=int, metavar="N",
                        help="of euler (default: the config's, 25)")
    parser.add_argument("--guidance", type=float, action="append", metavar="G",
                        help="of euler; repeat for a sweep (default: the config's)")
    parser.add_argument("--time", type=float, metavar="T",
                        help="two_step: the time between the steps (default: the config's)")
    parser.add_argument("--fresh-noise", action="store_true", default=None,
                        help="two_step: new noise for the second step")
    parser.add_argument("--weights", choices=("ema", "raw"),
                        help="averaged or raw weights of a run (default: ema)")
    parser.add_argument("--base", metavar="DIR",
                        help="component folder with the VAE and text encoder of a generator of "
                             "latents (default: where the run began)")
    parser.add_argument("--data", metavar="PATH",
                        help="prepared data set (default: the checkpoint's, or bundled:emoji)")
    parser.add_argument("--split", default="train", help="split for FD (default: train)")
    parser.add_argument("--held-out", metavar="SPLIT",
                        help="split for KID; '' leaves it out (default: holdout)")
    parser.add_argument("--frames", type=int, metavar="F",
                        help="1 is an image (default: as trained)")
    parser.add_argument("--height", type=int, metavar="H", help="pixels (default: as trained)")
    parser.add_argument("--width", type=int, metavar="W", help="pixels (default: as trained)")
    parser.add_argument("--count", type=int, metavar="N",
                        help="samples for FD (default: 0, one for every caption of the split)")
    parser.add_argument("--seed", type=int, help="of the noise (default: 0)")
    parser.add_argument("--batch", type=int, metavar="B",
                        help="samples per forward pass (default: 64)")
    parser.add_argument("--dim", type=int, default=128, metavar="D",
                        help="principal components of the FD; FDs of different D do not compare "
                             "(default: 128)")
    parser.add_argument("--out", default="runs/evaluation", metavar="DIR",
                        help="where evaluation.json and samples.npz go (default: runs/evaluation)")


def settle(args: argparse.Namespace) -> None:
    """Fills in the defaults of what was not given; UserError for a flag that would say nothing."""
    for name, default in DRAWING.items():
        given = getattr(args, name)
        if args.samples and given not in (None, ""):  # --held-out '' is what is done anyway
            raise UserError(f"--{name.replace('_', '-')} says how samples are drawn, and those of "
                            "--samples are measured as they are; drop it, or give --checkpoint")
        if given is None:
            setattr(args, name, default)


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table, writes the files."""
    from apt_jax.eval import evaluations
    from apt_jax.eval.evaluate import (
        check_counts,
        evaluate_generator,
        evaluate_samples,
        load_held_out,
        load_split,
    )
    from apt_jax.eval.samples import load_samples, save_samples
    from apt_jax.eval.table import format_result

    settle(args)
    check_counts(args.count, args.dim, args.batch)
    out = Path(args.out)
    with disk_errors(out):  # before the work of minutes
        out.mkdir(parents=True, exist_ok=True)
    if args.samples:
        samples = load_samples(args.samples)
        frames, height, width = samples.frames.shape[1:4]
        path = args.data or "bundled:emoji"
        real = load_split(path, args.split, frames, height, width)
        result = evaluate_samples(samples, real, args.dim)
        result |= {"samples": args.samples, "data": {"path": path, "split": args.split}}
    else:
        from apt_jax import api

        generator = api.load(args.checkpoint, args.weights, args.base)
        data = generator.config.data
        shape = tuple(size if asked is None else asked for asked, size in zip(
            (args.frames, args.height, args.width), generator.default_size()))
        for flag, asked in (("frames", args.frames), ("height", args.height), ("width", args.width)):
            if asked is not None and asked < 1:
                raise UserError(f"--{flag} {asked} must be at least 1")
        if all(shape):  # 0: the stored size, which the data know; wrong settings before any work
            generator.check(args.mode, args.seed, frames=shape[0], height=shape[1],
                            width=shape[2], steps=args.steps, time=args.time,
                            fresh_noise=args.fresh_noise)
        path = args.data or data.path
        asked = {"max_text_tokens": data.max_text_tokens, "frame_stride": data.frame_stride}
        real = load_split(path, args.split, *shape, **asked)
        held_out, why = load_held_out(path, args.held_out, *shape, **asked)
        source = {"data": {"path": path, "split": args.split, "held_out": args.held_out}}
        kept = None  # the samples that are written

        def keep(found, samples):
            nonlocal kept
            with disk_errors(out):
                if samples is not kept:
                    save_samples(out / evaluations.SAMPLES, samples.frames, samples.captions)
                    kept = samples
                evaluations.write_result(out, found | source)

        try:
            result, _ = evaluate_generator(
                generator, real, held_out, mode=args.mode, guidance=args.guidance or (),
                count=args.count, seed=args.seed, dim=args.dim, steps=args.steps, time=args.time,
                fresh_noise=args.fresh_noise, batch=args.batch, keep=keep, left_out=why)
        except KeyboardInterrupt:
            if kept is not None:
                print(f"apt-jax: what was measured so far is in {out / evaluations.FILE}",
                      file=sys.stderr)
            raise
        result |= source
    with disk_errors(out):
        file = evaluations.write_result(out, result)
    print(format_result(result, evaluations.label(result)))
    print(f"wrote {file}")
    return 0
