"""Stage 1 for Wan 2.1 T2V 1.3B: consistency distillation on images and 81-frame clips at 480p.

    apt-jax train --config configs/wan_1_3b_consistency.py --workdir runs/cd

Needs ckpt/wan13b (apt-jax convert import) and data/clips (apt-jax prepare). Cost, computed and not
run: 2 PFLOP a clip and update (two teacher evaluations, the target, one recomputed gradient), so
about 20 s an update on 64 H100 at 400 TFLOP/s, 30 hours in all. Gives: blurry one-step samples of
the right layout; the image stage starts from them.

The paper does not give optimiser, grid or updates here: AdamW at 1e-5 with weight decay 0.01, 32
intervals and 5,000 updates are those of the same authors' next work (arXiv 2506.09350). The grid is
shifted by 8, where Wan's own sampler puts its steps for this model, so that the teacher's Euler
steps are small where it needs them. Guidance is 6, the model card's, within the 5 to 7.5 of Wan and
of the paper.
"""

from wan_common import consistency, wan_config


def get_config():
    config = consistency(wan_config())
    config.name = "wan_1_3b_consistency"
    config.objective.consistency.shift = 8.0
    config.objective.consistency.guidance = 6.0
    config.train.accumulate = 0  # one sample at a time on every GPU
    config.train.ema_decay = 0.995
    return config
