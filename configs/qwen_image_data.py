"""The data set of qwen_image.py: images of about 1024 x 1024 in nine aspects.

    apt-jax convert import --source ./Qwen-Image --to ckpt/qwen_image
    apt-jax prepare --source ./photos --vae ckpt/qwen_image --text-encoder ckpt/qwen_image \\
        --config configs/qwen_image_data.py --to data/images

Needs PyTorch and transformers for the text encoder: pip install 'apt_jax[convert]'. Cost: 0.5 MB an
image and 7 KB for each token of a caption, as computed; never timed on a GPU (report.json says how
fast it went). Gives data/images with one latent bucket an aspect, in the splits train and holdout.

The negative prompt is Qwen-Image's own, one space. Images that would have to be enlarged by more
than a half are left out.
"""

from apt_jax.config.preparation import base_preparation_config


def get_config():
    config = base_preparation_config()
    config.sizes = ("1024px",)
    config.frames = (1,)
    config.fps = 0.0
    config.max_enlarge = 1.5
    config.max_tokens = 512
    config.negative_prompt = " "
    config.shard_records = 256
    return config
