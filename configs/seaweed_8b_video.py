"""Stage 3 of the paper: video APT of the 8B model, 2 seconds of 1280x720 at 24 fps.

    apt-jax train --config configs/seaweed_8b_video.py --workdir runs/seaweed_8b_video

Needs what apt_jax does not ship: 8B diffusion weights in weights/seaweed_8b, the run of
seaweed_8b_image.py (its EMA starts the generator, the original weights start the discriminator
anew), and a data set of captioned latents (13x90x160, 16 channels) in data/latents_720p. Cost in
the paper: 1,024 H100. Gives there: a VBench total of 82.00 in one step, where 25 diffusion steps
have 82.15.
"""

from seaweed_common import seaweed_config


def get_config():
    config = seaweed_config()
    config.name = "seaweed_8b_video"
    config.data.path = "data/latents_720p"
    config.data.frames = (13,)
    config.data.height, config.data.width = 90, 160  # 46,800 tokens
    config.init.generator = "runs/seaweed_8b_image"
    config.init.generator_weights = "ema"
    config.objective.adversarial.r1_sigma = 0.1
    config.objective.adversarial.time_shift = 12.0
    config.objective.flow.shift = 12.0
    config.optimizer.learning_rate = 3e-6
    config.train.batch_size = 2048
    config.train.accumulate = 0  # one clip at a time for each group of four devices
    config.train.steps = 300
    config.train.checkpoint_every = 5  # two hours on 64 H100s
    config.train.first_step_seconds = 21600.0  # an update is three hours on 8 H100s
    config.model.remat = "attention"  # not computed twice: a fifth less time for 6 GiB, 8 H100s
    config.mesh.context = 4  # four devices share a clip's tokens: activations are a quarter
    config.mesh.replica = config.mesh.fsdp = -1  # copies of at most 128 devices
    config.sample.shift = 12.0
    config.sample.fps = 24.0
    return config
