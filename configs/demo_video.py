"""Stage 3 of the demo: adversarial post-training on clips of 4 frames, 16 px.

    apt-jax train --config configs/demo_consistency.py:video --workdir runs/consistency_video
    apt-jax train --config configs/demo_video.py --workdir runs/video

The paper starts this stage from the EMA of the image stage; with so small a model it starts from a
consistency model of clips, and `--config.init.generator=runs/image` gives the paper's order.
Cost: an update takes about a second on two cores. Gives: a one-step generator of short clips.
"""

from demo_common import demo_config


def get_config():
    config = demo_config()
    config.name = "demo_video"
    config.stage = "adversarial"
    config.data.frames = (4,)
    config.init.generator = "runs/consistency_video"
    config.init.diffusion = "bundled:base"
    config.objective.adversarial.r1_weight = 100.0
    config.objective.adversarial.r1_sigma = 0.05
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 1.5e-4
    config.train.steps = 350
    return config
