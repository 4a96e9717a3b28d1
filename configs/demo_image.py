"""Stage 2 of the demo: adversarial post-training on images of 16 px.

    apt-jax train --config configs/demo_consistency.py --workdir runs/consistency
    apt-jax train --config configs/demo_image.py --workdir runs/image

Cost: an update (one D and one G step on 32 images) takes 0.45 to 0.65 s on two cores. Gives: a one-step
generator whose samples are as sharp as the data where those of the consistency model are noisy.
`make demo` runs and measures it.
"""

from demo_common import at_length, demo_config


def get_config(length="short"):
    config = demo_config(length)
    config.name = "demo_image"
    config.stage = "adversarial"
    config.init.generator = "runs/consistency"
    config.init.diffusion = "bundled:base"
    config.objective.adversarial.r1_weight = 100.0
    # The paper has 0.01 in its latents. In these pixels, with 700 updates, 0.01 let D run ahead
    # (FD 163, gradients a hundred times larger) and 0.02 gave FD 147; docs/tuning.md.
    config.objective.adversarial.r1_sigma = 0.02
    # D sees 1,527 pictures again and again: moved by up to two pixels, they stay news to it.
    config.objective.adversarial.translate = 0.125
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 1.5e-4
    config.train.batch_size, config.train.accumulate = 32, 4
    config.train.steps = 560 if length == "short" else 8000
    if length == "long":
        at_length(config)
        config.objective.adversarial.augment_after = 5000
    return config
