"""Stage 2 of the paper: image APT of the 8B model at 1024 px.

    apt-jax train --config configs/seaweed_8b_image.py --workdir runs/seaweed_8b_image

Needs what apt_jax does not ship: 8B diffusion weights in weights/seaweed_8b, a consistency model in
runs/seaweed_8b_consistency, and a data set of captioned latents (128x128, 16 channels) in
data/latents_1024. Cost in the paper: 128 to 256 H100. Gives there: a COCO-5K FID of 27.9 in one
step, where the consistency model has 119.6 and 25 diffusion steps 26.9.

The batch of 9062 = 2 x 23 x 197 divides no fleet: it is filled up with a few samples that the loss
does not count.
"""

from seaweed_common import seaweed_config


def get_config():
    config = seaweed_config()
    config.name = "seaweed_8b_image"
    config.data.path = "data/latents_1024"
    config.data.frames = (1,)
    config.data.height = config.data.width = 128  # 4,096 tokens
    config.init.generator = "runs/seaweed_8b_consistency"
    config.objective.adversarial.r1_sigma = 0.01
    config.objective.adversarial.time_shift = 1.0
    config.optimizer.learning_rate = 5e-6
    config.train.batch_size = 9062
    config.train.accumulate = 0  # one image of 4,096 tokens at a time on every device
    config.mesh.replica = config.mesh.fsdp = -1  # copies of at most 128 devices
    config.train.checkpoint_every = 10  # half an hour on 64 H100s
    config.train.steps = 350  # then take the EMA
    return config
