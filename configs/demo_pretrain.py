"""Stage 0 of the demo: flow matching on images and 4-frame clips of 16 px; makes the base model.

    apt-jax train --config configs/demo_pretrain.py --workdir runs/pretrain

Cost: about 0.2 s a step on two cores. Gives: a diffusion model that obeys short captions (hearts,
faces, fruit) with 25 guided steps. The package ships such a model as bundled:base.
"""

from demo_common import demo_config


def get_config():
    config = demo_config()
    config.name = "demo_pretrain"
    config.stage = "pretrain"
    config.data.frames = (1, 4)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 5000
    config.train.ema_decay = 0.999
    return config
