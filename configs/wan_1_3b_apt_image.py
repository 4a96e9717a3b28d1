"""Stage 2 for Wan 2.1 T2V 1.3B: image APT on single frames.

    apt-jax train --config configs/wan_1_3b_apt_image.py --workdir runs/apt_image

Needs ckpt/wan13b, data/clips with images in it, and the run of wan_1_3b_consistency.py in runs/cd.
Cost, computed and not run: 0.29 PFLOP an image of 4,096 tokens and update, so about 100 s an update
on 64 H100 at 400 TFLOP/s, 10 hours in all. Gives: sharp images in one step; its average starts the
video stage.

The paper's recipe (Sec. 3.3, 3.4): 350 updates of G and D at 5e-6, a penalty of weight 100 with
sigma 0.01, D's t unshifted. Its batch of 9062 divides few fleets; 9216 = 2^10 x 9 is the next that
does. Latents are normalised to deviation 1, so sigma is in the paper's units.
"""

from wan_common import adversarial, wan_config


def get_config():
    config = adversarial(wan_config())
    config.name = "wan_1_3b_apt_image"
    config.data.frames = (1,)
    config.init.generator = "runs/cd"
    config.objective.adversarial.r1_sigma = 0.01
    config.objective.adversarial.time_shift = 1.0
    config.optimizer.learning_rate = 5e-6
    config.train.steps = 350
    config.train.batch_size = 9216
    config.train.accumulate = 0  # one image at a time on every GPU; 18 has 8 on each of 64
    return config
