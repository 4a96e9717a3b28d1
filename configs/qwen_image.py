"""Stages 1 and 2 for Qwen-Image (20B MMDiT): consistency distillation, then image APT at 1024 px.

    apt-jax train --config configs/qwen_image.py:consistency --workdir runs/qwen_cd
    apt-jax train --config configs/qwen_image.py:apt --workdir runs/qwen_apt

Needs ckpt/qwen_image (apt-jax convert import) and data/images, latents and Qwen2.5-VL states that
apt-jax prepare wrote. Cost, computed and not run: 2.2 PFLOP an image and update of APT, so about
200 s an update on 256 H100 at 400 TFLOP/s, 20 hours; the consistency stage 0.8 PFLOP, 10 s and 14
hours. Gives: images in one step, to be exported with apt-jax convert export.

Choices: the paper's recipe for images (see seaweed_8b_image.py), with a batch of 9216, which
divides fleets where 9062 does not. Heads after blocks 27, 43 and 60 of 60, the paper's fractions.
Guidance 4 with the negative prompt " ", and shift 2, are Qwen-Image's own: its scheduler's dynamic
shift is exp(0.69) = 2.0 at the 4,096 tokens of 1024 px. Masters, average, moments and gradients of
G and D are 570 GB: one copy over 64 GPUs. Text is masked, not filled up, as its pipeline does.
"""

from apt_jax.config import base_config
from apt_jax.config.networks import use_network

STAGES = ("consistency", "apt")


def get_config(stage="apt"):
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; use qwen_image.py:STAGE, one of "
                         f"{', '.join(STAGES)}")
    config = base_config()
    config.name = f"qwen_image_{stage}"
    use_network(config, "qwen_image")
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.data.path = "data/images"
    config.data.frames = (1,)
    config.data.height = config.data.width = 0  # every bucket of the data set
    config.data.max_text_tokens = 512
    config.data.caption_dropout = 0.0
    config.data.threads = 8
    config.data.prefetch = 4
    config.init.diffusion = "ckpt/qwen_image"

    config.train.log_every = 1
    config.train.ema_decay = 0.995
    config.mesh.replica = -1
    config.mesh.fsdp = 64
    config.sample.guidance = 4.0
    config.sample.shift = 2.0
    config.sample.steps = 50

    if stage == "consistency":
        config.stage = "consistency"
        config.objective.consistency.steps = 32
        config.objective.consistency.shift = 2.0
        config.objective.consistency.guidance = 4.0
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 1e-5
        config.optimizer.weight_decay = 0.01
        config.train.steps = 5000
        config.train.batch_size = 1024
        config.train.accumulate = 2
        config.train.checkpoint_every = 250
        return config
    config.stage = "adversarial"
    config.init.generator = "runs/qwen_cd"
    config.objective.adversarial.r1_sigma = 0.01
    config.objective.adversarial.time_shift = 1.0
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 5e-6
    config.train.steps = 350
    config.train.batch_size = 9216
    config.train.accumulate = 18  # 512 images at a time: 2 on each of 256 GPUs
    config.train.checkpoint_every = 25
    return config
