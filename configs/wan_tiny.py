"""The three Wan recipes at a size that two CPU cores train in two minutes: `make demo-wan` runs them.

    apt-jax train --config configs/wan_tiny.py:consistency --workdir runs/demo-wan/cd
    apt-jax train --config configs/wan_tiny.py:image --workdir runs/demo-wan/apt_image
    apt-jax train --config configs/wan_tiny.py:video --workdir runs/demo-wan/apt_video

Needs runs/demo-wan/ckpt and runs/demo-wan/data, which launch/demo_wan.py makes of a WanPipeline
with random weights. Cost: under a minute and 1 GB for each stage. Gives: nothing to look at, the weights being
random; every step between a diffusers folder and a one-step diffusers folder, to be tried before it
is paid for. Stages, losses and optimisers are those of wan_1_3b_*.py; network, batch and steps are
small, the learning rates high enough that 20 updates move the weights, and float32 lets PyTorch's
samples be compared closely.
"""

from wan_1_3b_apt_image import get_config as image
from wan_1_3b_apt_video import get_config as video
from wan_1_3b_consistency import get_config as consistency

ROOT = "runs/demo-wan"
STAGES = {"consistency": consistency, "image": image, "video": video}
LATENT_FRAMES = 3  # 9 frames


def get_config(stage="video"):
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; use wan_tiny.py:STAGE, one of "
                         f"{', '.join(STAGES)}")
    config = STAGES[stage]()
    config.name = f"wan_tiny_{stage}"
    model = config.model
    model.width, model.depth, model.heads, model.head_dim = 24, 3, 2, 12
    model.rope_axes, model.text_width, model.frequency_width = (4, 4, 4), 24, 32
    model.mlp_ratio = 40 / 24
    model.dtype, model.remat = "float32", "none"
    config.discriminator.taps = (1, 2, 3)

    config.data.path = f"{ROOT}/data"
    config.data.frames = {"consistency": (1, LATENT_FRAMES), "image": (1,),
                          "video": (LATENT_FRAMES,)}[stage]
    config.data.threads = 1
    config.init.diffusion = f"{ROOT}/ckpt"
    config.init.generator = {"consistency": "", "image": f"{ROOT}/cd",
                             "video": f"{ROOT}/apt_image"}[stage]

    config.optimizer.learning_rate = 1e-3 if stage == "consistency" else 1e-4
    config.train.steps = 20
    config.train.batch_size = 8
    config.train.clip_batch_size = 8 if stage == "consistency" else 0
    config.train.accumulate = 1
    config.train.ema_decay = 0.9
    config.train.checkpoint_every = 20
    config.train.log_every = 5
    config.mesh.replica = 1
    config.mesh.fsdp = -1
    config.sample.fps = 8.0  # as wan_tiny_data.py
    return config
