"""The data set of the wan_1_3b configs: 81-frame clips at 480p and images around 1024 x 1024.

    apt-jax convert import --source ./Wan2.1-T2V-1.3B-Diffusers --to ckpt/wan13b
    apt-jax prepare --source ./clips --vae ckpt/wan13b --text-encoder ckpt/wan13b \\
        --config configs/wan_1_3b_data.py --to data/clips

Cost: 4.2 MB a clip of 832x480 and 0.5 MB an image, and 8 KB for each token of a caption, as
computed; never timed on a GPU (report.json says how fast it went). Gives data/clips with latent
buckets of 21 frames at 480p and 1 frame at 1024px, in the splits train and holdout.

Wan was trained on 81 frames at 16 a second, and a one-step model is no better than the length it
is trained on. The paper's own clips are 2 seconds at 24: --config.fps=24 --config.frames=1,49.
Windows are cut from the middle of equal parts of a film, at most four of one, so that long films do
not outweigh short ones; a film slower than 15 frames a second would repeat frames and is left out,
as is what would have to be enlarged by more than a half.
"""

from wan_common import LATENT_FRAMES, NEGATIVE_PROMPT

from apt_jax.config.preparation import base_preparation_config


def get_config():
    config = base_preparation_config()
    config.sizes = ("480p",)
    config.image_sizes = ("1024px",)
    config.frames = (1, 1 + 4 * (LATENT_FRAMES - 1))
    config.fps = 16.0
    config.min_fps = 15.0
    config.clips = 4
    config.max_enlarge = 1.5
    config.max_tokens = 512
    config.text_dtype = "bfloat16"
    config.negative_prompt = NEGATIVE_PROMPT
    return config
