"""Makes the base model that the package ships (bundled:base).

    apt-jax train --config configs/demo_pretrain.py --workdir runs/pretrain
    python launch/make_base.py --run runs/pretrain --out apt_jax/assets/base

Exports the run's average as a weights folder, tries guidance weights for images and for clips with
25 steps on all training captions, and writes the findings into config.json and the model card
README.md. Trained and measured on the train split only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo import GUIDANCE, KINDS  # noqa: E402

CARD = """\
# bundled:base

A small flow-matching diffusion model of Fluent emoji, images and 4-frame clips of {size} px: the
starting point of `make demo`, as Wan or Qwen-Image would be elsewhere.

- **Network**: MMDiT, width {width}, depth {depth}, {heads} heads, shared modulation;
  {parameters:,} parameters, float32. Pixels, no VAE.
- **Text**: per-token states of all-MiniLM-L6-v2, at most {tokens} tokens.
- **Trained on**: the train split of bundled:emoji alone ({images} images, {clips} clips). No
  held-out record was seen.
- **Made by** `apt-jax train --config configs/demo_pretrain.py --workdir runs/pretrain`
  ({steps} steps, average of decay {ema}) and
  `python launch/make_base.py --run runs/pretrain --out apt_jax/assets/base`.
- **Best guidance** (25 Euler steps, FD-MobileNetV2 to the train split, all training captions):

{table}

- **Limits**: rendered artwork, no photographs; rare captions come out poorly; captions do not
  describe motion.
- **Licence**: Apache-2.0, as the code. The art it learned from is Microsoft's Fluent emoji (MIT).
"""


def sweep(run: Path, config, kind: str) -> list[dict]:
    """FD of 25-step sampling on all training captions for every guidance weight."""
    from apt_jax import api
    from apt_jax.eval import evaluate
    from apt_jax.eval.measure import Reference, measure
    from apt_jax.eval.mobilenet import MobileNetFeatures

    data = config.data
    split = evaluate.load_split(data.path, "train", KINDS[kind], data.height, data.width,
                                data.max_text_tokens, data.frame_stride)
    extract = MobileNetFeatures()
    reference = Reference.build(split.frames, extract=extract)
    generator, found = api.load(run), []
    for guidance in GUIDANCE:
        samples, _ = evaluate.draw(generator, split, 0, f"{kind}, guidance {guidance:g}",
                                   mode="euler", guidance=guidance, seed=0)
        result = measure(samples.frames, reference, extract)
        found.append({"guidance": guidance, "fd": round(result["fd"], 2), "n": result["n"]})
        print(f"{kind}: guidance {guidance:g}: FD {result['fd']:.1f}", flush=True)
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)

    from apt_jax.errors import UserError, disk_errors

    try:
        with disk_errors(args.run, "read"):
            return make(args)
    except UserError as error:
        print(f"make_base: {error}", file=sys.stderr)
        return 2


def make(args: argparse.Namespace) -> int:
    """Measures, exports, writes the card; 0."""
    from apt_jax.config import load_json
    from apt_jax.data.pipeline import open_dataset
    from apt_jax.models.presets import make_generator
    from apt_jax.weights import export_run

    config = load_json(args.run / "config.json")
    sweeps = {kind: sweep(args.run, config, kind) for kind in KINDS}
    best = {kind: min(found, key=lambda row: row["fd"])["guidance"]
            for kind, found in sweeps.items()}
    config.sample.guidance = best["image"]
    steps = json.loads((args.run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    export_run(args.run, args.out, card={
        "best_guidance": best, "guidance_sweep": sweeps, "steps": steps,
        "sample": {**config.sample.to_dict()}, "licence": "Apache-2.0",
    })
    rows = ["| guidance | images | clips |", "|---|---|---|"] + [
        f"| {a['guidance']:g} | {a['fd']:.1f} | {b['fd']:.1f} |"
        for a, b in zip(sweeps["image"], sweeps["video"])]
    counts = {kind: open_dataset(config.data.path, "train", (frames,)).records
              for kind, frames in KINDS.items()}
    (args.out / "README.md").write_text(CARD.format(
        size=config.data.height, width=config.model.width, depth=config.model.depth,
        heads=config.model.heads, tokens=config.data.max_text_tokens,
        parameters=make_generator(config.model).parameter_count(), images=counts["image"],
        clips=counts["video"], steps=steps, ema=config.train.ema_decay, table="\n".join(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
