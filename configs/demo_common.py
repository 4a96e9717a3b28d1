"""What the demo's stages share: 16 px Fluent emoji, one small network.

Not a config by itself; demo_pretrain.py, demo_consistency.py, demo_image.py and demo_video.py
import it. Each of them takes an argument: `demo_image.py:long` is the same stage at length, as
`make demo-long` runs it: five to eight hours on one core of a CPU, less on two.
"""

from apt_jax.config import base_config

LENGTHS = ("short", "long")


def demo_config(length: str = "short"):
    if length not in LENGTHS:
        raise ValueError(f"unknown length {length!r}; use {' or '.join(LENGTHS)}")
    config = base_config()
    config.data.path = "bundled:emoji"
    config.data.height = config.data.width = 16
    config.data.max_text_tokens = 8  # 1% of the captions are longer; they are cut

    config.model.patch = (1, 2, 2)  # 64 tokens a frame
    config.model.width = 96
    config.model.depth = 4
    config.model.heads = 3
    config.model.head_dim = 32
    config.model.rope_axes = (8, 12, 12)
    config.model.modulation = "shared"  # as the 8B preset: 1.05M parameters
    config.model.text_width = 384  # all-MiniLM-L6-v2
    # Nothing is computed twice: all of `make demo` stays within 2 GiB (docs/benches.md).
    config.model.remat = "none"
    config.discriminator.heads = 3

    config.train.batch_size = 64
    config.train.clip_batch_size = 16  # as many tokens as 64 images
    config.train.accumulate = 4
    config.train.checkpoint_every = 100 if length == "short" else 500
    config.sample.guidance = 3.0
    return config


def at_length(config) -> None:
    """What a long adversarial stage adds: a D that cannot know its pictures by heart, the penalty on
    generated samples, and a slower average.

    Moved samples alone keep D from knowing 1,527 pictures by heart for the length of `make demo`;
    after 5,000 updates unseen pictures lost two thirds of what told D seen ones from generated, and
    G hardly improved any more. In other colours and with a hole as well it goes on; from the start
    these slow it down, so the image stage has them once it has come so far (docs/tuning.md).

    With the penalty on real samples alone D won for good after 3,000 updates; the authors' later work
    (arXiv 2506.05301, 2506.09350) has it on generated ones too. With both the generator improves with
    the sum of its rates, so the rate is high and does not fall; the noise that this leaves in the raw
    weights is the average's to take out (docs/tuning.md).
    """
    config.objective.adversarial.color = 0.5
    config.objective.adversarial.cutout = 0.5
    config.objective.adversarial.r2 = True
    config.optimizer.warmup_steps = 100  # D learns first: RMSProp's first steps are its largest
    config.optimizer.learning_rate = 3e-4
    config.train.ema_decay = 0.999
