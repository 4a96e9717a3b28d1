"""Stage 1 of the demo: consistency distillation of the base model, on images and clips in one run.

    apt-jax train --config configs/demo_consistency.py --workdir runs/consistency

Cost: a step is three evaluations of the network and one gradient, 0.4 s on two cores.
Gives: noisy one-step samples (images 1.49, clips 1.38 times as sharp as the data after 600 updates,
docs/results/demo). The image stage starts from them, and they are the baseline of both APT stages.

Of the recipe of arXiv 2506.09350 (N = 32, guidance 7.5, a constant 1e-5, 5,000 updates) only AdamW,
its weight decay and the constant rate are kept; docs/tuning.md says what a falling rate gives.
"""

from demo_common import demo_config


def get_config(length="short"):
    config = demo_config(length)
    config.name = "demo_consistency"
    config.stage = "consistency"
    config.data.frames = (1, 4)
    config.init.generator = "bundled:base"
    config.init.diffusion = "bundled:base"
    config.objective.consistency.steps = 16 if length == "short" else 32
    config.objective.consistency.guidance = 3.0
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.01
    config.train.steps = 600 if length == "short" else 2000
    config.train.ema_decay = 0.99 if length == "short" else 0.999
    return config
