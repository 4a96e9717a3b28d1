"""Stage 3 for Wan 2.1 T2V 1.3B: video APT on 81-frame clips at 480p.

    apt-jax train --config configs/wan_1_3b_apt_video.py --workdir runs/apt_video

Needs ckpt/wan13b, data/clips, and the run of wan_1_3b_apt_image.py in runs/apt_image: its average
starts the generator, the original weights start the discriminator anew. Cost, computed and not run:
6 PFLOP a clip and update, so about 4 minutes an update on 64 H100 at 400 TFLOP/s, 20 hours in all.
Gives: a clip with one evaluation of the network, to be exported with apt-jax convert export.

The paper's recipe (Sec. 3.3, 3.4): 300 updates at 3e-6, a penalty of weight 100 with sigma 0.1, D's
t shifted by 12. Its batch is 2048; at 256 its model collapsed and at 1024 it did not (App. E), so
1024 here for half the cost; --config.train.batch_size=2048 for the paper's. The two-step time of
0.5 is ours, to be swept.
"""

from wan_common import LATENT_FRAMES, adversarial, wan_config


def get_config():
    config = adversarial(wan_config())
    config.name = "wan_1_3b_apt_video"
    config.data.frames = (LATENT_FRAMES,)
    config.init.generator = "runs/apt_image"
    config.objective.adversarial.r1_sigma = 0.1
    config.objective.adversarial.time_shift = 12.0
    config.optimizer.learning_rate = 3e-6
    config.train.steps = 300
    config.train.batch_size = 1024
    config.train.accumulate = 0  # one clip at a time on every GPU
    return config
