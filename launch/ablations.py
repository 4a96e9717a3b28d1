"""The first ablations: the image stage of the demo with one thing changed at a time.

    python launch/ablations.py --base runs/demo --workdir runs/ablations --steps 350 --out docs

Needs a finished demo (its consistency model is where every run starts). Every variant is
configs/demo_image.py with the overrides shown in the table, the same seed, data order and noise.
Writes ablations.json, and with --out a page of results (ablations.md) and a plot of the curves.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo import ROOT, check_runs  # noqa: E402

# name -> (what it is called, overrides, what the paper saw)
VARIANTS = {
    "demo": ("the demo's recipe", [], ""),
    "as_it_is": ("D sees samples as they are", ["--config.objective.adversarial.translate=0.0"],
                 "as in the paper, with its millions of samples"),
    "no_r1": ("no R1 penalty", ["--config.objective.adversarial.r1=false"],
              "D's loss falls to 0 and G collapses (Sec. 5.1, Fig. 5)"),
    "last_head": ("heads at the last block only", ["--config.discriminator.taps=4,"],
                  "worse structure (Fig. 7)"),
    "frozen": ("D's backbone frozen", ["--config.discriminator.backbone=frozen"],
               "artifacts (App. F)"),
    "t0": ("D's t fixed at 0", ["--config.objective.adversarial.fixed_time=0.0"],
           "collapses (Sec. 3.3)"),
}
CURVES = (("discriminator/d_gan", "D's loss without penalty"), ("generator/g_loss", "G's loss"),
          ("logit gap", "D(real) - D(generated)"))


def variant_config(name: str, args):
    """The config of one variant: it starts where the base's image stage did."""
    from apt_jax.config import load_config, load_json, validate
    from apt_jax.weights import init_path

    config = load_config(ROOT / "configs" / "demo_image.py", VARIANTS[name][1])
    config.name, config.seed, config.train.steps = f"ablation_{name}", args.seed, args.steps
    image = args.base / "image"
    # A base that pre-trained its own model starts D from that one.
    config.init.diffusion = init_path(image, load_json(image / "config.json").init.diffusion)
    config.init.generator = str(args.base / "consistency")
    return validate(config)


def train_variant(name: str, config, args) -> dict:
    """Train one variant (or find it trained) and measure its one-step samples."""
    from apt_jax import api
    from apt_jax.eval import evaluate
    from apt_jax.eval.measure import Reference, measure
    from apt_jax.eval.samples import save_samples
    from apt_jax.train.loop import train

    run = args.workdir / name
    if train(config, run)["status"] != "complete":
        raise SystemExit(1)
    data = config.data
    split = evaluate.load_split(data.path, "train", 1, data.height, data.width,
                                data.max_text_tokens)
    reference = Reference.build(split.frames, cache_dir=args.workdir / "cache")
    found = {}
    for weights in ("ema", "raw"):
        samples, _ = evaluate.draw(api.load(run, weights), split, 0, f"{name} {weights}",
                                   mode="one_step", seed=args.seed)
        result = measure(samples.frames, reference)
        found[weights] = {key: result[key] for key in ("fd", "sharpness_ratio", "n")}
        save_samples(run / "samples" / f"{weights}.npz", samples.frames, samples.captions)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["logit gap"] = row["discriminator/logit_real"] - row["discriminator/logit_fake"]
    tail = rows[-max(1, len(rows) // 10):]
    found["end"] = {key: sum(r[key] for r in tail) / len(tail) for key, _ in CURVES}
    found["curves"] = {key: [r[key] for r in rows] for key, _ in CURVES}
    found["step"] = [r["step"] for r in rows]
    return found


def plot(results: dict, path: Path) -> None:
    """One panel per curve, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(14, 4.6), constrained_layout=True)
    for axis, (key, title) in zip(axes, CURVES):
        for name, found in results.items():
            axis.plot(found["step"], found["curves"][key], label=VARIANTS[name][0], linewidth=1.4)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(results: dict, args) -> str:
    """The results as Markdown."""
    lines = [
        "# Ablations of the image stage", "",
        f"`python launch/ablations.py --base BASE --workdir WORKDIR --steps {args.steps} "
        f"--seed {args.seed} --out docs`: `configs/demo_image.py` with one thing changed, "
        f"{args.steps} updates, one seed, the same start, data order and noise. FD-MobileNetV2 of "
        "one-step samples on all training captions; lower is better. The last columns are means "
        "over the last tenth of the run.", "",
        "| variant | FD, EMA | FD, raw | sharpness to data | D's loss | D(real) - D(fake) | paper |",
        "|---|---|---|---|---|---|---|"]
    for name, found in results.items():
        title, overrides, paper = VARIANTS[name]
        how = f" (`{' '.join(overrides)}`)" if overrides else ""
        lines.append(
            f"| {title}{how} | {found['ema']['fd']:.1f} | {found['raw']['fd']:.1f} | "
            f"{found['ema']['sharpness_ratio']:.2f} | {found['end']['discriminator/d_gan']:.2f} | "
            f"{found['end']['logit gap']:.2f} | {paper} |")
    return "\n".join([*lines, "", "![curves](ablations.png)", ""])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the page and the plot")
    args = parser.parse_args(argv)

    from apt_jax.errors import UserError

    try:
        configs = {name: variant_config(name, args) for name in VARIANTS}
        check_runs(configs, args.workdir)
        results = {name: train_variant(name, config, args) for name, config in configs.items()}
    except UserError as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # training saves and ends by itself; this is between two runs
        print("ablations: interrupted; the same command goes on", file=sys.stderr)
        return 130
    (args.workdir / "ablations.json").write_text(json.dumps(results, indent=1) + "\n")
    text = page(results, args)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(results, args.out / "ablations.png")
        # What follows the first heading "## " is written by hand and kept.
        target = args.out / "ablations.md"
        kept = target.read_text().partition("\n## ")[2] if target.is_file() else ""
        target.write_text(text + (f"\n## {kept}" if kept else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
