"""Stage 3 of the demo: adversarial post-training on clips of 4 frames, 16 px.

    apt-jax train --config configs/demo_image.py --workdir runs/image
    apt-jax train --config configs/demo_video.py --workdir runs/video

As in the paper, the generator starts from the image stage's average and the discriminator from
the original diffusion weights; at length the image stage's discriminator goes on instead. Cost: an
update takes 1 to 1.4 s on two cores. Gives: a one-step generator of short clips.
"""

from demo_common import at_length, demo_config


def get_config(length="short"):
    config = demo_config(length)
    config.name = "demo_video"
    config.stage = "adversarial"
    config.data.frames = (4,)
    config.init.generator = "runs/image"
    config.init.diffusion = "bundled:base"
    config.objective.adversarial.r1_weight = 100.0
    # The paper has sigma 0.1 and shift 12 for clips of 46,800 tokens; with 256 tokens, sigma 0.05
    # and shift 12 left D without a gap between real and generated (docs/tuning.md).
    config.objective.adversarial.r1_sigma = 0.02
    config.objective.adversarial.time_shift = 1.0
    config.objective.adversarial.translate = 0.125  # as on images
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 1.5e-4
    config.train.steps = 150 if length == "short" else 1500
    if length == "long":
        at_length(config)
        # It tells real from generated from the first update; one begun anew did after 200 to 1,300
        # updates, or never (docs/tuning.md).
        config.init.discriminator = "runs/image"
        # Most of a clip's quality is its frames', and there are 1,527 pictures beside 606 clips: with
        # both the FD of clips is 111 after 1,000 updates where clips alone have 117 (docs/tuning.md).
        config.data.frames = (1, 4)
    return config
