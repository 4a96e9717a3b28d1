"""Does a run's discriminator know its training images by heart? Its logits on both splits.

    python launch/memorised.py runs/demo-long-0/image

Prints D's mean logit on real samples, on real samples moved by one pixel and on generated ones (raw
weights), for the captions of the training split and of the held-out one, as JSON with --json. A
discriminator that judges pictures gives unseen real ones what it gives seen ones; the part of the
gap between real and generated that the unseen ones lose is memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

BATCHES = 4


def logits(run: Path, seed: int) -> dict:
    """{"step", "train" and "holdout": {"real", "moved", "generated"}, "memorised"}."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from apt_jax.config import base_config, load_json, validate
    from apt_jax.data.pipeline import batches, open_dataset
    from apt_jax.errors import UserError
    from apt_jax.objectives.adversarial import generate
    from apt_jax.parallel.mesh import make_mesh
    from apt_jax.train.checkpoint import Checkpoints
    from apt_jax.train.folder import RunFolder
    from apt_jax.train.state import set_up

    if not (run / "checkpoints").is_dir() or not any((run / "checkpoints").iterdir()):
        raise UserError(f"{run} has no checkpoint; give a run folder that apt-jax train wrote")
    config = base_config()  # a run may be older than a field
    config.update(load_json(run / "config.json"))
    config = validate(config)
    if config.stage != "adversarial":
        raise UserError(f"{run} is of stage {config.stage!r} and has no discriminator")
    if config.lora.rank:
        raise UserError(f"{run} trained adapters (lora.rank = {config.lora.rank}); give a run that "
                        "trained whole networks")
    data, setup = config.data, set_up(config, make_mesh(config.mesh))
    with RunFolder(run):  # opening tidies up, also what a run that still trains is writing
        checkpoints = Checkpoints(run, config)
        restored = checkpoints.restore(setup.abstract)
        checkpoints.close()
    if restored is None:
        raise UserError(f"{run} has no checkpoint yet; train it first")
    state, nets = restored.state, setup.nets

    @jax.jit
    def judge(d, g, x, text, mask, key):
        keys = jax.random.split(key, len(x))
        time = jax.random.uniform(key, (len(x),))
        fake = generate(nets.velocity, g, {"x": x, "text": text, "text_mask": mask}, keys)
        seen = {"real": x, "moved": jnp.roll(x, 1, axis=2), "generated": fake}
        return {name: nets.discriminate(d, value, time, text, mask).mean()
                for name, value in seen.items()}

    found = {"run": str(run), "step": restored.step}
    for split in ("train", "holdout"):
        dataset = open_dataset(data.path, split, data.frames, data.height, data.width,
                               data.frame_stride, data.max_text_tokens, 0.0)
        stream = batches(dataset, batch_size=config.train.batch_size,
                         clip_batch_size=config.train.clip_batch_size, seed=seed)
        rows = []
        for number in range(BATCHES):
            batch = next(stream)
            rows.append(jax.device_get(judge(
                state["discriminator"], state["generator"], batch["x"], batch["text"],
                batch["text_mask"], jax.random.key(number))))
        found[split] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    gap = {split: found[split]["real"] - found[split]["generated"] for split in ("train", "holdout")}
    found["memorised"] = 1 - gap["holdout"] / gap["train"]
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of an adversarial run")
    parser.add_argument("--seed", type=int, default=1, help="which samples are looked at")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)

    from apt_jax.errors import UserError

    try:
        found = logits(args.run, args.seed)
    except UserError as error:
        print(f"memorised: {error}", file=sys.stderr)
        return 2
    for split in ("train", "holdout"):
        print(f"{split:8}", ", ".join(f"{name} {value:+.2f}" for name, value in found[split].items()))
    print(f"step {found['step']}: {found['memorised']:.0%} of the gap between real and generated is "
          "lost on unseen images")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
