"""Stage 0 of the demo: flow matching on images and 4-frame clips of 16 px; makes the base model.

    apt-jax train --config configs/demo_pretrain.py --workdir runs/pretrain

Cost: 0.3 s a step on two cores. Gives: a diffusion model that obeys short captions (hearts, faces,
fruit) with 25 guided steps. The package ships this run's average as bundled:base
(launch/make_base.py made it).
"""

from demo_common import demo_config


def get_config(length="short"):
    config = demo_config(length)
    config.name = "demo_pretrain"
    config.stage = "pretrain"
    config.data.frames = (1, 4)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 3600 if length == "short" else 5000
    config.train.ema_decay = 0.999
    return config
