"""The data set of wan_tiny.py: clips of 9 frames and single images, 96 x 64 pixels.

    apt-jax prepare --source runs/demo-wan/clips --vae runs/demo-wan/ckpt \\
        --text-encoder runs/demo-wan/ckpt --config configs/wan_tiny_data.py --to runs/demo-wan/data

Cost: half a minute on two cores. Gives latent buckets of 3 and of 1 frames. The rules are those of
wan_1_3b_data.py, the sizes small; nothing is held out.
"""

from wan_1_3b_data import get_config as full


def get_config():
    config = full()
    config.sizes = config.image_sizes = ("96x64",)
    config.frames = (1, 9)
    config.fps = 8.0
    config.min_fps = 0.0
    config.clips = 8
    config.max_enlarge = 0.0
    config.holdout = 0.0
    config.max_tokens = 128
    config.shard_records = 16
    config.dtype = "float32"
    return config
