"""Train one stage of the demo and measure its one-step samples as it goes: FD against updates.

    python launch/curve.py --config configs/demo_image.py --start runs/demo/consistency \\
        --updates 1250 --every 250 --out runs/curve_image.jsonl
    python launch/curve.py --config configs/demo_video.py --start runs/demo/image \\
        --updates 500 --every 100 --out runs/curve_video.jsonl

Writes a line of JSON every --every updates: FD-MobileNetV2 and sharpness (over the data's) of the raw
weights, of the config's average and of one with each decay of --decays, and D's mean loss without
penalty since the line before. Nothing is resumed: for studies of minutes to an hour, not for runs
to keep. docs/tuning.md's longer runs came from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

STRIDE = 10  # the extra averages take every 10th weight, with the decay to the 10th power


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config file of an adversarial stage")
    parser.add_argument("--start", required=True, help="run that the generator starts from")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="updates between measurements")
    parser.add_argument("--decays", type=float, nargs="*", default=[0.998])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    args, overrides = parser.parse_known_args(argv)

    from apt_jax.errors import UserError

    try:
        run(args, overrides)
    except UserError as error:
        print(f"curve: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Train and measure; lines go to the file and to the terminal."""
    import jax
    import numpy as np
    from tqdm import trange

    from apt_jax import api
    from apt_jax.config import load_config, load_json, validate
    from apt_jax.data.pipeline import batches, open_dataset
    from apt_jax.errors import UserError
    from apt_jax.eval import evaluate
    from apt_jax.eval.measure import Reference, measure
    from apt_jax.eval.mobilenet import MobileNetFeatures
    from apt_jax.parallel.mesh import batch_unit, make_mesh
    from apt_jax.train.feeding import put_batch
    from apt_jax.train.state import init_state, set_up
    from apt_jax.train.steps import build_update
    from apt_jax.weights import init_path

    config = load_config(args.config, overrides)
    config.init.generator = args.start
    started = Path(args.start)
    if (started / "config.json").is_file() and not any("init.diffusion" in o for o in overrides):
        # The diffusion weights that the run came from, its own or the shipped ones, for D to start from
        # where init.discriminator names no run.
        came_from = load_json(started / "config.json").init.diffusion
        config.init.diffusion = init_path(started, came_from) or config.init.diffusion
    config.train.steps = args.updates
    config = validate(config)
    if config.stage != "adversarial" or config.lora.rank:
        raise UserError(f"{args.config} is of stage {config.stage!r} with lora.rank = "
                        f"{config.lora.rank}; give a config of an adversarial stage that trains "
                        "whole networks")
    if args.every < 1 or args.updates < 1:
        raise UserError(f"--every {args.every} --updates {args.updates} must be at least 1")
    data, frames = config.data, max(config.data.frames)
    mesh = make_mesh(config.mesh)
    setup = set_up(config, mesh)
    state = init_state(config, setup)
    update = build_update(config, setup.nets, setup.optimizers, mesh, setup.shardings)
    stream = batches(
        open_dataset(data.path, data.split, data.frames, data.height, data.width,
                     data.frame_stride, data.max_text_tokens, data.caption_dropout),
        batch_size=config.train.batch_size, clip_batch_size=config.train.clip_batch_size,
        seed=config.seed, multiple=batch_unit(mesh, config.train.accumulate))
    split = evaluate.load_split(data.path, data.split, frames, data.height, data.width,
                                data.max_text_tokens, data.frame_stride)
    extract = MobileNetFeatures()
    reference = Reference.build(split.frames, extract=extract)

    def measured(params) -> dict:
        generator = api.Generator(config.model, jax.device_get(params), config)
        samples, _ = evaluate.draw(generator, split, 0, "", mode="one_step", seed=config.seed,
                                   batch=max(1, 64 // frames))
        found = measure(samples.frames, reference, extract)
        return {"fd": found["fd"], "sharpness_ratio": found["sharpness_ratio"]}

    averages = {decay: jax.device_get(state["generator"]) for decay in args.decays}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", encoding="utf-8") as out:
        losses = []
        for step in trange(1, args.updates + 1, desc=config.name):
            state, metrics = update(state, {}, put_batch(
                next(stream), mesh, config.train.accumulate))
            losses.append(metrics["discriminator/d_gan"])
            if step % STRIDE == 0:
                now = jax.device_get(state["generator"])
                averages = {
                    decay: jax.tree.map(
                        lambda old, new, k=decay**STRIDE: k * old + (1 - k) * new, old, now)
                    for decay, old in averages.items()}
            if step % args.every == 0 or step == args.updates:
                row = {"step": step, "d_gan": float(np.mean(jax.device_get(losses))),
                       "raw": measured(state["generator"]),
                       "ema": measured(state["generator_ema"]),
                       **{f"ema_{d:g}": measured(p) for d, p in averages.items()}}
                losses = []
                print(json.dumps(row), file=out, flush=True)
                short = {k: round(v["fd"], 1) if isinstance(v, dict) else v
                             for k, v in row.items()}
                print(json.dumps(short), flush=True)


if __name__ == "__main__":
    sys.exit(main())
