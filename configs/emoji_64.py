"""All stages on the Fluent emoji at 64 px, images and clips of 8 frames, sized for one H100.

    python launch/demo.py --family emoji_64                # all stages, the table, the report
    python launch/demo.py --family emoji_64 --limit 8      # the same in pieces of 8 minutes

or one stage after the other:

    for stage in pretrain consistency image video; do
      apt-jax train --config configs/emoji_64.py:$stage --workdir runs/emoji_64/$stage
    done

Meant to cost about 20 minutes on one H100; on two CPU cores it is only good for a look. A stage
that is stopped is continued by the same command. What a piece needs of the one before are the
stages' folders, no file of which has more than 16 MB; samples/ and cache/ are made again (the clips'
reference is 25 MB) and can stay behind. Gives: the paper's comparison (diffusion with 25
steps, consistency with one, APT with one and two) at a size where the pictures can be looked at.
"""

from apt_jax.config import base_config

STAGES = ("pretrain", "consistency", "image", "video")
RUNS = "runs/emoji_64"


def get_config(stage="image"):
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; use emoji_64.py:STAGE, one of "
                         f"{', '.join(STAGES)}")
    config = base_config()
    config.name = f"emoji_64_{stage}"

    config.data.height = config.data.width = 64
    config.data.frames = {"image": (1,), "video": (8,)}.get(stage, (1, 8))
    config.data.threads = 8
    config.data.prefetch = 4

    config.model.patch = (1, 4, 4)  # 256 tokens a frame
    config.model.width = 256
    config.model.depth = 9
    config.model.heads = 4
    config.model.head_dim = 64
    config.model.rope_axes = (16, 24, 24)
    config.model.modulation = "shared"
    config.model.dtype = "bfloat16"

    config.train.log_every = 20
    config.train.checkpoint_every = 500
    config.train.batch_size = 256
    config.train.clip_batch_size = 64
    config.sample.guidance = 3.0

    base = f"{RUNS}/pretrain"
    if stage == "pretrain":
        config.stage = "pretrain"
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 6e-4
        config.optimizer.warmup_steps = 500
        config.train.steps = 8000
        config.train.ema_decay = 0.999
    elif stage == "consistency":
        config.stage = "consistency"
        config.init.generator = config.init.diffusion = base
        config.objective.consistency.guidance = 3.0
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 2e-4
        config.optimizer.weight_decay = 0.01
        config.train.steps = 1500
    else:
        config.stage = "adversarial"
        # The paper's order: clips start from the average of the image stage.
        config.init.generator = f"{RUNS}/consistency" if stage == "image" else f"{RUNS}/image"
        config.init.diffusion = base
        config.objective.adversarial.r1_sigma = 0.05 if stage == "video" else 0.01
        config.objective.adversarial.time_shift = 1.0
        config.objective.adversarial.translate = 0.125  # 1,527 pictures: configs/demo_image.py
        config.optimizer.name = "rmsprop"
        config.optimizer.learning_rate = 1e-4
        config.train.steps = 1500
    return config
