"""The 8B network of the paper's recipe; seaweed_8b_image.py and seaweed_8b_video.py import it.

36 layers, bfloat16, three heads at blocks 16, 26 and 36 are the paper's. Width, heads, channels of
the latents and of the text are not given there: they follow the public 7B model of the same lab.
"""

from apt_jax.config import base_config


def seaweed_config():
    config = base_config()
    config.stage = "adversarial"
    config.data.split = "train"
    config.data.max_text_tokens = 256
    config.data.caption_dropout = 0.0  # APT needs no guidance
    config.data.threads = 16
    config.data.prefetch = 4

    config.model.in_channels = config.model.out_channels = 16  # latents, 8x8x4 compression
    config.model.patch = (1, 2, 2)
    config.model.width = 3072
    config.model.depth = 36
    config.model.heads = 24
    config.model.head_dim = 128
    config.model.rope_axes = (16, 56, 56)
    config.model.text_width = 5120
    config.model.modulation = "shared"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.discriminator.taps = (16, 26, 36)
    config.discriminator.backbone = "train"
    config.discriminator.heads = 24

    config.init.diffusion = "weights/seaweed_8b"  # the original, not the distilled model

    config.objective.adversarial.r1 = True
    config.objective.adversarial.r1_mode = "approximate"
    config.objective.adversarial.r1_weight = 100.0
    config.objective.adversarial.loss = "non_saturating"

    config.optimizer.name = "rmsprop"
    config.optimizer.decay = 0.9
    config.optimizer.weight_decay = 0.0
    config.train.ema_decay = 0.995
    config.train.log_every = 1
    config.train.checkpoint_every = 25
    config.sample.guidance = 7.5
    return config
