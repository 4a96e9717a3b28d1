"""Stage 1 of the demo: consistency distillation of the base model, for images or for clips.

    apt-jax train --config configs/demo_consistency.py:image --workdir runs/consistency_image
    apt-jax train --config configs/demo_consistency.py:video --workdir runs/consistency_video

Cost: a step is three evaluations of the network and one gradient, about 0.3 s on two cores for
images. Gives: blurry one-step samples of the right shapes and colours, where APT starts from.
"""

from demo_common import demo_config


def get_config(kind="image"):
    if kind not in ("image", "video"):
        raise ValueError(f"unknown kind {kind!r}; use demo_consistency.py:image or :video")
    config = demo_config()
    config.name = f"demo_consistency_{kind}"
    config.stage = "consistency"
    config.init.generator = "bundled:base"
    config.init.diffusion = "bundled:base"
    config.objective.consistency.guidance = 3.0
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.01
    config.train.steps = 400
    if kind == "video":
        config.data.frames = (4,)
        config.train.batch_size = 16
    return config
