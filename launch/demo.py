"""The main job: from a base model to a one-step generator of images and of clips, and its report.

    python launch/demo.py --workdir runs/demo                       # what `make demo` runs
    python launch/demo.py --workdir runs/demo-full --pretrain       # pre-trains the base too
    python launch/demo.py --workdir runs/demo-long-1 --pretrain --long --seed 1

Consistency distillation, image APT and video APT run live (with --pretrain the base model before
them), each in a folder of its own below the work directory. Then every model draws samples for
the training captions and is measured: summary.json, samples/{image,video}/NAME.npz, report.html.
The same command continues a job that was stopped; a finished one prints its table again.
--config.GROUP.FIELD=VALUE overrides a field in every stage that is run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"image": 1, "video": 4}  # kind -> frames of a sample
# Where a base model's card names no best guidance (a base trained just now), these are tried.
GUIDANCE = (2.0, 3.0, 4.0)
# Towards t = 1 the second step only repeats the first: what is gained lies in between, if anywhere.
TWO_STEP_TIMES = (0.25, 0.5, 0.75, 0.9, 0.95)
BATCH = 32  # frames drawn at a time; with guidance 64 are computed, more no longer fit the caches
COUNT = {"image": 0, "video": 0}  # 0: one sample for every training caption


def stages(long: bool, pretrain: bool) -> dict[str, str]:
    """Run folder -> config file, in the order of the method."""
    suffix = ":long" if long else ""
    names = ("pretrain",) * pretrain + ("consistency", "image", "video")
    return {name: f"{ROOT / 'configs' / f'demo_{name}.py'}{suffix}" for name in names}


def stage_config(name: str, path: str, workdir: Path, pretrain: bool, seed: int, overrides):
    """A stage's config with its starting points moved into this job's folders."""
    from apt_jax.config import load_config, validate

    config = load_config(path, list(overrides))
    config.seed = seed
    base = str(workdir / "pretrain") if pretrain else "bundled:base"
    if name != "pretrain":
        config.init.diffusion = base
        before = {"consistency": base, "image": workdir / "consistency", "video": workdir / "image"}
        config.init.generator = str(before[name])
    return validate(config)


def train_all(configs: dict, workdir: Path) -> dict[str, float] | None:
    """Train what is not trained yet; seconds of training per stage, or None when stopped."""
    from apt_jax.train.loop import train

    seconds = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        print(f"[{number}/{len(configs) + 1}] {name}: {config.train.steps} updates", flush=True)
        result = train(config, workdir / name)
        if result["status"] != "complete":
            return None
        seconds[name] = result["seconds"]
    return seconds


def best_guidance(base: str, kind: str) -> list[float]:
    """The guidance that the base model's card found best for a kind, else all candidates."""
    from apt_jax.weights import generator_card

    best = (generator_card(base).get("best_guidance") or {}).get(kind)
    return list(GUIDANCE) if best is None else [float(best)]


def measure_kind(kind: str, config, workdir: Path, base: str, seed: int) -> tuple[dict, dict]:
    """Sample and measure every entry of one kind; writes the sample files.

    Returns the kind's part of the summary and facts about its data.
    """
    from apt_jax import api
    from apt_jax.eval import evaluate
    from apt_jax.eval.measure import Reference, floor, measure
    from apt_jax.eval.mobilenet import MobileNetFeatures
    from apt_jax.eval.samples import save_samples

    data = config.data
    split = evaluate.load_split(data.path, "train", KINDS[kind], data.height, data.width,
                                data.max_text_tokens)
    extract = MobileNetFeatures()
    reference = Reference.build(split.frames, cache_dir=workdir / "cache", extract=extract)
    folder = workdir / "samples" / kind
    save_samples(folder / "data.npz", split.frames, split.captions)
    entries = {"floor": floor(reference)}

    def entry(name: str, generators: list, trials: list[dict], mode: str) -> None:
        """Try every setting with every generator, keep the best by FD, and write its samples."""
        results = []
        for generator, trial in itertools.product(generators, trials):
            samples, used = evaluate.draw(generator, split, COUNT[kind], f"{kind} {name}",
                                          mode=mode, seed=seed, batch=BATCH // KINDS[kind], **trial)
            result = measure(samples.frames, reference, extract)
            result["seconds"] = used["sampling_seconds"]
            result |= {key: used[key] for key in ("guidance", "steps", "time") if key in used}
            result["weights"] = used["weights"]
            results.append((result, samples))
        best, samples = min(results, key=lambda r: r[0]["fd"])
        if len(generators) > 1:  # the same run's two: the one that was not chosen
            best["other_fd"] = max(r["fd"] for r, _ in results)
        if len(trials) > 1:
            knob = next(iter(trials[0]))
            best["sweep"] = [{knob: r[knob], "fd": r["fd"]} for r, _ in results]
        save_samples(folder / f"{name}.npz", samples.frames, samples.captions)
        entries[name] = best
        print(f"  {kind} {name}: FD {best['fd']:.1f}", flush=True)

    sweep = [{"guidance": g} for g in best_guidance(base, kind)]
    entry("diffusion_25", [api.load(base)], sweep, "euler")
    # A baseline is shown at its best: after few updates at a constant rate that may be either.
    distilled = [api.load(workdir / "consistency", weights) for weights in ("ema", "raw")]
    entry("consistency_1", distilled, [{}], "one_step")
    averaged, raw = api.load(workdir / kind), api.load(workdir / kind, "raw")
    entry("apt_1", [averaged], [{}], "one_step")
    entry("apt_1_raw", [raw], [{}], "one_step")
    entry("apt_2", [averaged], [{"time": t} for t in TWO_STEP_TIMES], "two_step")
    facts = {"train": len(split.frames), "frames": KINDS[kind], "height": split.frames.shape[2],
             "width": split.frames.shape[3], "reference": reference.hash[:16]}
    return entries, facts


def write_pictures(workdir: Path) -> None:
    """image.png and video.webp: a column per caption, a row per model, labelled on the left."""
    import numpy as np

    from apt_jax import media
    from apt_jax.eval.samples import load_samples

    rows = {"data": "real", "diffusion_25": "diffusion 25", "consistency_1": "consistency 1",
            "apt_1": "APT 1 step", "apt_2": "APT 2 steps"}
    for kind, frames in KINDS.items():
        sets = {name: load_samples(workdir / "samples" / kind / f"{name}.npz") for name in rows}
        captions = sets["apt_1"].captions
        chosen = np.linspace(0, len(captions) - 1, 12).round().astype(int)  # spread, not picked
        clips = np.concatenate([sets[name].frames[chosen] for name in rows])
        labels = [f"{rows[name] if i == 0 else ''}" for name in rows for i in range(len(chosen))]
        sheet = media.clip_grid(clips, columns=len(chosen), labels=labels, size=80)
        if frames == 1:
            media.save_png(workdir / "image.png", sheet[0])
        else:
            media.save_webp(workdir / "video.webp", sheet, fps=4)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--pretrain", action="store_true", help="pre-train the base model too")
    parser.add_argument("--long", action="store_true", help="the configs' :long lengths")
    parser.add_argument("--seed", type=int, default=0)
    args, overrides = parser.parse_known_args(argv)

    from apt_jax.errors import UserError

    try:
        return run(args, overrides)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """The whole job of one command line; 0 when it is complete, 1 when it was stopped."""
    from apt_jax.config import config_to_json
    from apt_jax.eval.report import write_report
    from apt_jax.eval.table import format_table

    workdir = args.workdir
    configs = {
        name: stage_config(name, path, workdir, args.pretrain, args.seed, overrides)
        for name, path in stages(args.long, args.pretrain).items()
    }
    recipe = {name: json.loads(config_to_json(config)) for name, config in configs.items()}
    summary_file, recipe_file = workdir / "summary.json", workdir / "recipe.json"
    if not (_read(summary_file) and _read(recipe_file) == recipe and (workdir / "report.html").is_file()):
        workdir.mkdir(parents=True, exist_ok=True)
        seconds = train_all(configs, workdir)
        if seconds is None:
            return 1
        begun = time.monotonic()
        print(f"[{len(configs) + 1}/{len(configs) + 1}] sampling and measuring", flush=True)
        base = configs["image"].init.diffusion
        summary, facts = {}, {"name": configs["image"].data.path}
        for kind in KINDS:
            summary[kind], facts[kind] = measure_kind(kind, configs[kind], workdir, base, args.seed)
        seconds["measuring"] = round(time.monotonic() - begun, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        summary |= {"length": "long" if args.long else "short",
                    "data": facts, "seed": args.seed, "seconds": seconds,
                    "memory_gib": round(peak, 2), "base": "pretrain" if args.pretrain else base}
        _write(summary_file, summary)
        write_pictures(workdir)
        write_report(workdir)
        _write(recipe_file, recipe)
    print()
    print(format_table(_read(summary_file)))
    print(f"\nreport: {workdir / 'report.html'}")
    return 0


def _read(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, value) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
