"""Draws images or clips from prompts with a trained generator.

One step is the APT generator G(z, c) = z - v(z, c, 1); two steps go back to time t on the path and
take a second one; euler is the diffusion sampler with guidance. Images are written as PNG, clips as
MP4 and animated WebP, with a grid of all and sample.json; the time of a forward pass after
compilation is printed. The same seed gives the same noise in every mode.

Runs on one device unless the mesh flags of `apt-jax train` are given; then on all of them:
--config.mesh.context=N shares the tokens of a sample, .fsdp the weights and the samples, .tensor
the heads. The pictures are the same.
"""

from __future__ import annotations

import argparse

EXAMPLES = """\
  apt-jax sample --checkpoint runs/image --prompt "red heart" --prompt cat --out runs/samples
  apt-jax sample --checkpoint bundled:base --prompt "red apple" --steps 25 --guidance 3
  apt-jax sample --checkpoint runs/video --prompt "waving hand" --frames 4 --steps 2 --time 0.6
  apt-jax sample --checkpoint runs/image --prompt "red heart" --count 8 --seed 7 --weights raw
  apt-jax sample --checkpoint runs/apt_video --prompt "a cat surfing" --height 480 --width 832 \\
      --frames 81 --steps 1
  apt-jax sample --checkpoint runs/video --prompt "waving hand" --config.mesh.context=8
"""

OVERRIDES = ("mesh.",)  # taken as by apt-jax train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `apt-jax sample`."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH",
                        help="a run folder, a weights folder, a component folder of convert import, "
                             "or bundled:base")
    parser.add_argument("--base", metavar="DIR",
                        help="component folder with the VAE and text encoder of a generator of "
                             "latents (default: where the run began)")
    parser.add_argument("--tiled", action="store_true",
                        help="decode latents in blended tiles, as diffusers' enable_tiling does")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT",
                        help="a caption; may be given several times")
    parser.add_argument("--mode", choices=("one_step", "two_step", "euler"),
                        help="default: from --steps (1, 2, more), else one_step")
    parser.add_argument("--steps", type=int, metavar="N",
                        help="1 is one_step, 2 is two_step, more is euler; with --mode euler any "
                             "number (default there: the config's, 25)")
    parser.add_argument("--guidance", type=float, metavar="G",
                        help="guidance of euler (default: the config's)")
    parser.add_argument("--negative", default="", metavar="TEXT",
                        help="negative prompt of euler's guidance (default: the empty one)")
    parser.add_argument("--time", type=float, metavar="T",
                        help="two_step: the time between the steps, 0 to 1 (default: the config's)")
    parser.add_argument("--fresh-noise", action="store_true",
                        help="two_step: new noise for the second step instead of the first's")
    parser.add_argument("--frames", type=int, metavar="F",
                        help="1 is an image (default: as trained)")
    parser.add_argument("--height", type=int, metavar="H", help="pixels (default: as trained)")
    parser.add_argument("--width", type=int, metavar="W", help="pixels (default: as trained)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--count", type=int, default=1, metavar="N",
                        help="samples of every prompt (default: 1)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="averaged or raw weights of a run (default: ema)")
    parser.add_argument("--save-latents", action="store_true",
                        help="write latents.safetensors too: the noise and the latents, float32 "
                             "[sample, frame, row, column, channel]")
    parser.add_argument("--out", default="runs/samples", metavar="DIR",
                        help="where the files go, in place of those of an earlier call (default: "
                             "runs/samples)")


def choose_mode(mode: str | None, steps: int | None) -> tuple[str, int | None]:
    """(mode, steps of euler or None) from the two flags; UserError if they contradict."""
    from apt_jax.errors import UserError

    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps} must be at least 1")
    if mode == "euler":
        return mode, steps
    by_steps = {None: None, 1: "one_step", 2: "two_step"}.get(steps, "euler")
    if mode is not None and by_steps not in (None, mode):
        raise UserError(f"--mode {mode} takes {1 if mode == 'one_step' else 2} of --steps, not "
                        f"{steps}; drop --steps or use --mode euler")
    mode = mode or by_steps or "one_step"
    return mode, steps if mode == "euler" else None


def mesh_of(overrides: list[str]) -> dict[str, int] | None:
    """config.mesh as the flags set it; fsdp takes the rest of the devices. None without flags."""
    from apt_jax.config import base_config
    from apt_jax.config.load import apply_overrides

    if not overrides:
        return None
    config = base_config()
    apply_overrides(config, overrides)
    axes = ("replica", "context", "tensor")
    if -1 in (config.mesh[axis] for axis in axes) and config.mesh.fsdp == -1:
        config.mesh.fsdp = 1  # its default is the rest, which was asked for elsewhere
    return dict(config.mesh)


def run(args: argparse.Namespace) -> int:
    """Samples, saves, prints the time of a forward pass and the paths."""
    mode, steps = choose_mode(args.mode, args.steps)
    guided = args.guidance is not None or args.negative
    if guided and args.mode is None and args.steps is None:
        mode = "euler"  # guidance has a meaning there only

    from apt_jax import api

    generator = api.load(args.checkpoint, args.weights, args.base, mesh=mesh_of(args.overrides),
                         tiled=args.tiled)
    out = api.writable(args.out)  # before the work
    samples = generator.sample(
        args.prompt, mode, args.seed, count=args.count, frames=args.frames, height=args.height,
        width=args.width, steps=steps, guidance=args.guidance, time=args.time,
        fresh_noise=args.fresh_noise or None, timing=0 if generator.latents else 5,
        negative=args.negative, label="sampling" if generator.latents else "",
        latents=args.save_latents)
    paths = api.save(samples, out)
    evaluations = {"one_step": 1, "two_step": 2}.get(mode) or 2 * samples.settings["steps"]
    if generator.latents:  # a clip takes long: it is not drawn again for a median
        count, seconds, how = len(samples), samples.settings["sampling_seconds"], "VAE included"
    else:
        count, seconds, how = samples.settings["batch"], samples.seconds, "median of 5"
    took = f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.1f} ms"
    print(f"{mode}: {evaluations} network evaluation{'s' if evaluations > 1 else ''}, {took} for "
          f"{count} sample{'s' if count > 1 else ''} after compilation ({how})")
    what = "clip" if samples.frames.shape[1] > 1 else "image"
    print(f"wrote {len(samples)} {what}{'s' if len(samples) > 1 else ''} to "
          f"{out}; a grid of all: {next(p for p in paths if p.stem == 'grid')}")
    return 0
