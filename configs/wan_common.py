"""What the stages of Wan 2.1 T2V 1.3B share; wan_1_3b_*.py import it, and wan_14b.py.

Choices, and where they come from:

network    the public one, untouched; bfloat16 compute over float32 masters (paper: BF16 mixed
           precision). Time embedding, modulation and residual sums are float32 inside the model, as
           in Wan's own code.
latents    data.height = width = 0 takes every bucket that the data set holds, so that all aspects
           train; a bucket is one compilation. 832x480 is 60 x 104 latents, 1,560 tokens a frame.
clips      21 latent frames are 81 frames, the length that Wan was trained on: 32,760 tokens. A
           one-step model is no better than its training length: distil at the length to sample.
text       up to 512 UMT5 states, filled up with zeros inside the network and not masked, as Wan's
           pipeline does; no caption is dropped, since neither student nor APT needs guidance.
taps       heads after blocks 13, 22 and 30 of 30: the paper's 16, 26 and 36 of 36.
sharding   masters, average, moments and gradients of G and D are 35 GB in float32: over 8 GPUs
           (fsdp) they are small beside the activations, and one copy per 8 GPUs (replica = the
           rest) keeps the gathers inside a node. With every block recomputed (remat full) a clip
           keeps 3 GB of hidden states a network pass, so no sample is cut: mesh.context = 1.
           Computed, not run. With train.accumulate = 0 fewer GPUs take more turns.
guidance   6, and shift 8 for sampling: the model card's for the 1.3B model (5 and 5 for the 14B).
negative   the teacher's one fixed negative prompt is NEGATIVE_PROMPT, Wan's own; prepare encodes it
           once into the data set.
"""

from apt_jax.config import base_config
from apt_jax.config.networks import use_network

LATENT_FRAMES = 21  # 81 frames

# The default of Wan's own sampling code (Apache-2.0).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def wan_config(network: str = "wan_1_3b"):
    config = base_config()
    use_network(config, network)
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.data.path = "data/clips"  # written by apt-jax prepare with wan_1_3b_data.py
    config.data.height = config.data.width = 0
    config.data.max_text_tokens = 512
    config.data.caption_dropout = 0.0
    config.data.threads = 8
    config.data.prefetch = 4

    config.init.diffusion = "ckpt/wan13b"  # teacher; D's start: the original weights (Sec. 3.3)

    config.train.log_every = 1
    config.train.sample_every = 0  # the text encoder and the VAE are not held while training
    config.mesh.replica = -1
    config.mesh.fsdp = 8

    config.sample.guidance = 6.0
    config.sample.shift = 8.0
    config.sample.steps = 50
    return config


def consistency(config):
    """What the distillation of every size shares: the follow-up work's optimiser and length."""
    config.stage = "consistency"
    config.data.frames = (1, LATENT_FRAMES)
    config.objective.consistency.steps = 32
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.01
    config.train.steps = 5000
    config.train.batch_size = 1024
    config.train.clip_batch_size = 256
    config.train.checkpoint_every = 250
    return config


def adversarial(config):
    """What image and video APT share: the paper's optimiser, penalty and average."""
    config.stage = "adversarial"
    config.init.generator_weights = "ema"
    config.discriminator.taps = (13, 22, 30)
    config.discriminator.backbone = "train"
    config.objective.adversarial.r1 = True
    config.objective.adversarial.r1_mode = "approximate"
    config.objective.adversarial.r1_weight = 100.0
    config.objective.adversarial.loss = "non_saturating"
    config.optimizer.name = "rmsprop"
    config.optimizer.decay = 0.9
    config.optimizer.weight_decay = 0.0
    config.train.ema_decay = 0.995
    # Two updates of clips are 40 minutes for 1.3B on 8 H100s and two hours for 14B on 64.
    config.train.checkpoint_every = 2
    config.train.first_step_seconds = 10800.0
    return config
