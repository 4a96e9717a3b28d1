"""All stages for Wan 2.1 T2V 14B at 720p: the wan_1_3b recipes on the larger network.

    for stage in consistency image video; do
      apt-jax train --config configs/wan_14b.py:$stage --workdir runs/wan_14b/$stage
    done

Needs ckpt/wan14b (apt-jax convert import) and data/clips_720p (apt-jax prepare with
configs/wan_1_3b_data.py and --config.sizes=720p). Cost, computed and not run: 137 PFLOP a clip of
75,600 tokens and update of APT, so 11 minutes an update on 512 H100 at 400 TFLOP/s, 57 hours; the
consistency stage 48 PFLOP a clip, 1 minute and 80 hours for its 5,000 updates. Gives: 81 frames of
1280x720 with one evaluation of the network.

What differs: guidance 5 and shift 5, which Wan recommends for this model at 720p; heads after
blocks 18, 29 and 40 of 40. A clip's hidden states take 31 GB a pass, so eight GPUs share its tokens
(mesh.context, 40 heads over 8); masters, average, moments and gradients of G and D, 400 GB, are cut
over those eight times eight.
"""

from wan_common import LATENT_FRAMES, adversarial, consistency, wan_config

STAGES = ("consistency", "image", "video")
RUNS = "runs/wan_14b"


def get_config(stage="video"):
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; use wan_14b.py:STAGE, one of "
                         f"{', '.join(STAGES)}")
    config = wan_config("wan_14b")
    config.name = f"wan_14b_{stage}"
    config.data.path = "data/clips_720p"
    config.init.diffusion = "ckpt/wan14b"
    config.mesh.context = 8
    config.sample.guidance = 5.0
    config.sample.shift = 5.0

    if stage == "consistency":
        consistency(config)
        config.objective.consistency.shift = 5.0
        config.objective.consistency.guidance = 5.0
        config.train.accumulate = 0  # one sample at a time for each 8 GPUs
        return config
    adversarial(config)
    config.discriminator.taps = (18, 29, 40)
    if stage == "image":
        config.data.frames = (1,)
        config.init.generator = f"{RUNS}/consistency"
        config.objective.adversarial.r1_sigma = 0.01
        config.objective.adversarial.time_shift = 1.0
        config.optimizer.learning_rate = 5e-6
        config.train.steps = 350
        config.train.batch_size = 9216
        config.train.accumulate = 0
        return config
    config.data.frames = (LATENT_FRAMES,)
    config.init.generator = f"{RUNS}/image"
    config.model.remat = "attention"  # not computed twice: a fifth less time for 19 GiB, 64 H100s
    config.objective.adversarial.r1_sigma = 0.1
    config.objective.adversarial.time_shift = 12.0
    config.optimizer.learning_rate = 3e-6
    config.train.steps = 300
    config.train.batch_size = 1024
    config.train.accumulate = 0
    return config
