"""The main job: from a base model to a one-step generator of images and of clips, and its report.

    python launch/demo.py --workdir runs/demo                       # what `make demo` runs
    python launch/demo.py --workdir runs/demo-full --pretrain       # pre-trains the base too
    python launch/demo.py --workdir runs/demo-long-1 --pretrain --long --seed 1
    python launch/demo.py --family emoji_64 --limit 8               # 64 px, in pieces of 8 minutes

Consistency distillation, image APT and video APT run live (with --pretrain the base model before
them), each in a folder of its own below the work directory. Then every model draws samples for
the training captions and is measured: summary.json, samples/{image,video}/NAME.npz, report.html.
The same command continues a job that was stopped, also one whose --limit was over (status 1); a
finished one prints its table again. Stages that were trained with other settings are refused.
--config.GROUP.FIELD=VALUE overrides a field in every stage that is run.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

from limit import Limit

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"image": 1, "video": 4}  # kind -> frames of a sample of the demo
# Where a base model's card names no best guidance (a base trained just now), these are tried.
GUIDANCE = (2.0, 3.0, 4.0)
# Towards t = 1 the second step only repeats the first: what is gained lies in between, if anywhere.
# 0.5 was the best in none of the runs under docs/results; the demo has no time to try it again.
TWO_STEP_TIMES = (0.75, 0.9, 0.95)
GO_ON = "the same command goes on"
COUNT = {"image": 0, "video": 0}  # 0: one sample for every training caption


class Family(NamedTuple):
    """A set of configs, one for each stage: its file with {stage} in it, and how it is run."""

    configs: str
    batch: int  # frames drawn at a time; with guidance twice as many are computed
    lengths: bool  # has :long
    base: str  # where the method starts without --pretrain; "": it always pre-trains


FAMILIES = {
    # More than 32 frames no longer fit the caches of a CPU.
    "demo": Family("demo_{stage}.py", 32, True, "bundled:base"),
    "emoji_64": Family("emoji_64.py:{stage}", 256, False, ""),
}


def stages(long: bool, pretrain: bool, family: str = "demo") -> dict[str, str]:
    """Run folder -> config file, in the order of the method."""
    from apt_jax.errors import UserError

    found = FAMILIES[family]
    if long and not found.lengths:
        raise UserError(f"{family} has one length; drop --long")
    suffix = ":long" if long else ""
    names = ("pretrain",) * (pretrain or not found.base) + ("consistency", "image", "video")
    return {name: str(ROOT / "configs" / found.configs.format(stage=name)) + suffix
            for name in names}


def stage_config(name: str, path: str, workdir: Path, pretrain: bool, seed: int, overrides):
    """A stage's config with its starting points moved into this job's folders."""
    from apt_jax.config import load_config, validate
    from apt_jax.errors import UserError

    for override in overrides:
        if override.startswith(("--config.seed=", "--config.init.generator=",
                                "--config.init.diffusion=")):
            raise UserError(f"{override}: what the stages of a study start from follows from --workdir "
                            "and --pretrain, and the seed from --seed; drop it")
    config = load_config(path, list(overrides))
    config.seed = seed
    base = str(workdir / "pretrain") if pretrain else "bundled:base"
    if name != "pretrain":
        config.init.diffusion = base
        before = {"consistency": base, "image": workdir / "consistency", "video": workdir / "image"}
        config.init.generator = str(before[name])
        if config.init.discriminator:
            config.init.discriminator = str(before[name])
    return validate(config)


def check_runs(configs: dict, workdir: Path) -> None:
    """UserError, before anything is trained, where a stage's folder holds a run of other settings.

    A run that is not at its end may go on with other ones (`apt-jax train` warns of each), but not
    with another seed: that is what a study is named by.
    """
    from apt_jax.errors import UserError
    from apt_jax.train.checkpoint import newest_saved
    from apt_jax.train.course import check_course

    longer: dict[Path, str] = {}  # stages to train further, by folder
    for name, config in configs.items():
        found = newest_saved(workdir / name)
        if found is None:
            continue
        saved, step = found
        if any(line.startswith("seed = ") for line in check_course(saved, config, step,
                                                                   workdir / name)):
            raise UserError(f"{workdir / name} was begun with seed = {saved.seed}, not "
                            f"{config.seed}; use another --workdir, or the old seed")
        for place in {Path(config.init.generator), Path(config.init.diffusion)} & set(longer):
            print(f"warning: {name} was begun with the {longer[place]} stage as it was, which is "
                  f"now trained further; move {workdir / name} away to begin it anew",
                  file=sys.stderr, flush=True)
        if step < config.train.steps:
            longer[workdir / name] = name


def train_all(configs: dict, workdir: Path, limit: Limit) -> dict[str, float] | None:
    """Train what is not trained yet; seconds of training per stage, or None when stopped."""
    from apt_jax.train.loop import train

    seconds = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        if limit.over():
            print(f"{workdir}: the time is up before the {name} stage; {GO_ON}", file=sys.stderr)
            return None
        print(f"[{number}/{len(configs) + 1}] {name}: {config.train.steps} updates", flush=True)
        with limit.training():
            result = train(config, workdir / name)
        if result["status"] != "complete":
            return None
        seconds[name] = result["seconds"]
    return seconds


def run_digests(workdir: Path, names) -> dict[str, str]:
    """What tells the trained runs of WORKDIR from others of the same recipe: their logs have the
    seconds of every line."""
    files = {name: workdir / name / "metrics.jsonl" for name in names}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
            for name, file in files.items()}


class Measured:
    """What a stopped call had measured: WORKDIR/measured.json, of one recipe, runs and program."""

    def __init__(self, workdir: Path, recipe: dict):
        runs = run_digests(workdir, recipe)
        digest = hashlib.sha256(json.dumps([recipe, runs, COUNT]).encode()
                                + Path(__file__).read_bytes())
        self._path, key = workdir / "measured.json", digest.hexdigest()
        found = _read(self._path)
        fresh = {"key": key, "seconds": 0.0, "entries": {}}
        self._found = found if found and found.get("key") == key else fresh
        self._begun, self._before = time.monotonic(), self._found["seconds"]

    @property
    def seconds(self) -> float:
        """Measuring so far, over all calls."""
        return round(self._before + time.monotonic() - self._begun, 1)

    def get(self, name: str) -> dict | None:
        return self._found["entries"].get(name)

    def put(self, name: str, entry: dict) -> None:
        self._found["entries"][name] = entry
        self._found["seconds"] = self.seconds
        _write(self._path, self._found)

    def done(self) -> None:  # all of it is in the summary
        self._path.unlink(missing_ok=True)


def best_guidance(base: str, kind: str) -> list[float]:
    """The guidance that the base model's card found best for a kind, else all candidates."""
    from apt_jax.weights import generator_card

    best = (generator_card(base).get("best_guidance") or {}).get(kind)
    return list(GUIDANCE) if best is None else [float(best)]


def measure_kind(kind: str, config, workdir: Path, base: str, seed: int, batch: int,
                 measured: Measured, limit: Limit) -> tuple[dict, dict] | None:
    """Sample and measure every entry of one kind; writes the sample files.

    batch: frames drawn at a time. Returns the kind's part of the summary and facts about its data,
    or None when the time is up.
    """
    from apt_jax import api
    from apt_jax.eval import evaluate
    from apt_jax.eval.measure import Reference, floor, measure
    from apt_jax.eval.mobilenet import MobileNetFeatures
    from apt_jax.eval.samples import save_samples

    if limit.over():
        return None
    data, frames = config.data, max(config.data.frames)
    split = evaluate.load_split(data.path, "train", frames, data.height, data.width,
                                data.max_text_tokens, data.frame_stride)
    extract = MobileNetFeatures()
    reference = Reference.build(split.frames, cache_dir=workdir / "cache", extract=extract)
    folder = workdir / "samples" / kind
    save_samples(folder / "data.npz", split.frames, split.captions)
    entries = {"floor": floor(reference)}

    def entry(name: str, weights: list[tuple], trials: list[dict], mode: str) -> bool:
        """Try every setting with all weights, keep the best by FD, and write its samples; False
        when the time is up."""
        file, key = folder / f"{name}.npz", f"{kind}/{name}"
        known = measured.get(key)
        if known and file.is_file():
            entries[name] = known
            return True
        # Of an entry that was stopped the file holds the best so far.
        results = file.is_file() and measured.get(f"{key}, tried") or []
        generators = {}
        for where, trial in list(itertools.product(weights, trials))[len(results):]:
            if limit.over():
                return False
            generator = generators.get(where) or generators.setdefault(where, api.load(*where))
            samples, used = evaluate.draw(generator, split, COUNT[kind], f"{kind} {name}",
                                          mode=mode, seed=seed, batch=max(1, batch // frames),
                                          **trial)
            result = measure(samples.frames, reference, extract)
            result["seconds"] = used["sampling_seconds"]
            result |= {field: used[field] for field in ("guidance", "steps", "time", "weights")
                       if field in used}
            if all(result["fd"] < other["fd"] for other in results):
                save_samples(file, samples.frames, samples.captions)
            results.append(result)
            measured.put(f"{key}, tried", results)
        best = dict(min(results, key=lambda r: r["fd"]))
        if len(weights) > 1:  # the same run's two: the one that was not chosen
            best["other_fd"] = max(r["fd"] for r in results)
        if len(trials) > 1:
            knob = next(iter(trials[0]))
            best["sweep"] = [{knob: r[knob], "fd": r["fd"]} for r in results]
        entries[name] = best
        measured.put(key, best)
        print(f"  {kind} {name}: FD {best['fd']:.1f}", flush=True)
        return True

    guidance = [{"guidance": g} for g in best_guidance(base, kind)]
    times = [{"time": t} for t in TWO_STEP_TIMES]
    # The baseline is shown at its best: after few updates at a constant rate that may be either.
    distilled = [(workdir / "consistency", weights) for weights in ("ema", "raw")]
    complete = all(itertools.starmap(entry, (
        ("diffusion_25", [(base,)], guidance, "euler"),
        ("consistency_1", distilled, [{}], "one_step"),
        ("apt_1", [(workdir / kind,)], [{}], "one_step"),
        ("apt_1_raw", [(workdir / kind, "raw")], [{}], "one_step"),
        ("apt_2", [(workdir / kind,)], times, "two_step"))))
    if not complete:
        return None
    facts = {"train": len(split.frames), "frames": frames, "height": split.frames.shape[2],
             "width": split.frames.shape[3], "reference": reference.hash[:16]}
    return entries, facts


def write_pictures(workdir: Path) -> None:
    """image.png and video.webp: a column per caption, a row per model, labelled on the left."""
    import numpy as np

    from apt_jax import media
    from apt_jax.eval.samples import load_samples

    rows = {"data": "real", "diffusion_25": "diffusion 25", "consistency_1": "consistency 1",
            "apt_1": "APT 1 step", "apt_2": "APT 2 steps"}
    for kind in KINDS:
        sets = {name: load_samples(workdir / "samples" / kind / f"{name}.npz") for name in rows}
        captions = sets["apt_1"].captions
        chosen = np.linspace(0, len(captions) - 1, 12).round().astype(int)  # spread, not picked
        clips = np.concatenate([sets[name].frames[chosen] for name in rows])
        labels = [rows[name] if i == 0 else "" for name in rows for i in range(len(chosen))]
        sheet = media.clip_grid(clips, columns=len(chosen), labels=labels, size=80)
        if kind == "image":
            media.save_png(workdir / "image.png", sheet[0])
        else:
            media.save_webp(workdir / "video.webp", sheet, fps=4)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"demo: {message}; see --help\n")  # one line
    parser.add_argument("--workdir", type=Path, help="default: runs/FAMILY")
    parser.add_argument("--family", choices=FAMILIES, default="demo",
                        help="configs/: demo (16 px) or emoji_64 (64 px, for a GPU; it pre-trains)")
    parser.add_argument("--pretrain", action="store_true", help="pre-train the base model too")
    parser.add_argument("--long", action="store_true", help="the configs' :long lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=0.0, metavar="MINUTES",
                        help="stop then, saved, with status 1; the same command goes on (0: none)")
    args, overrides = parser.parse_known_args(argv)
    if not 0 <= args.limit < math.inf:
        parser.error(f"--limit {args.limit:g} is no number of minutes; give 8, or 0 for none")

    from apt_jax.errors import UserError, disk_errors

    args.workdir = (args.workdir or Path("runs") / args.family).expanduser()
    try:
        with disk_errors(args.workdir):
            return run(args, overrides)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # training ends by itself, saved; the rest keeps what it measured
        print(f"demo: interrupted; {GO_ON}", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """The whole job of one command line; 0 when it is complete, 1 when it was stopped."""
    from apt_jax.config import config_to_json
    from apt_jax.eval.report import write_report
    from apt_jax.eval.table import format_table

    workdir, limit = args.workdir, Limit(args.limit)
    files = stages(args.long, args.pretrain, args.family)
    pretrain = "pretrain" in files
    configs = {name: stage_config(name, path, workdir, pretrain, args.seed, overrides)
               for name, path in files.items()}
    recipe = {name: json.loads(config_to_json(config)) for name, config in configs.items()}
    summary_file, recipe_file = workdir / "summary.json", workdir / "recipe.json"
    summary = _read(summary_file) or {}
    same = summary.get("runs") in (None, run_digests(workdir, configs))  # none: of an older commit
    if not (summary and same and _read(recipe_file) == recipe
            and (workdir / "report.html").is_file()):
        check_runs(configs, workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        seconds = train_all(configs, workdir, limit)
        if seconds is None:
            return 1
        print(f"[{len(configs) + 1}/{len(configs) + 1}] sampling and measuring", flush=True)
        base = configs["image"].init.diffusion
        summary, facts = {}, {"name": configs["image"].data.path}
        measured = Measured(workdir, recipe)
        for kind in KINDS:
            found = measure_kind(kind, configs[kind], workdir, base, args.seed,
                                 FAMILIES[args.family].batch, measured, limit)
            if found is None:
                print(f"{workdir}: the time is up while measuring; {GO_ON}",
                      file=sys.stderr)
                return 1
            summary[kind], facts[kind] = found
        seconds["measuring"] = measured.seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        length = "long" if args.long else "short"
        summary |= {"length": length if FAMILIES[args.family].lengths else args.family,
                    "data": facts, "seed": args.seed, "seconds": seconds,
                    "memory_gib": round(peak, 2), "base": "pretrain" if pretrain else base,
                    "runs": run_digests(workdir, configs)}
        _write(summary_file, summary)
        write_pictures(workdir)
        write_report(workdir)
        _write(recipe_file, recipe)
        measured.done()
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
