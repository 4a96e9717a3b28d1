"""Every field of a configuration, once: its key, default, meaning and the values it may take.

`base_config()` turns the table into an `ml_collections.ConfigDict`; a config file starts from it
and changes fields. `validate` reads the same ranges and choices, `--help` the same sentences.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

STAGES = ("pretrain", "consistency", "adversarial")
INITS = ("", "bundled:base")
REMATS = ("none", "full", "dots", "attention", "exchange", "offload")
ATTENTION = ("auto", "oracle", "xla", "pallas", "hopper", "tokamax", "cudnn", "cudnn_fp8", "splash")


@dataclasses.dataclass(frozen=True)
class Field:
    """One configuration field.

    low / high bound a number (or each number of a tuple); both are allowed values unless
    `open_low` or `open_high` says that it is not itself. choices lists the only allowed values.
    """

    key: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple | None = None
    open_high: bool = False


def _f(key, default, help, low=None, high=None, open_low=False, choices=None,  # noqa: A002
       open_high=False) -> Field:
    return Field(key, default, help, low, high, open_low, choices, open_high)


FIELDS: tuple[Field, ...] = (
    _f("name", "run", "a name for the run, shown in logs and reports"),
    _f("stage", "pretrain", "which objective trains", choices=STAGES),
    _f("seed", 0, "fixes initial weights, noise, data order and dropout", low=0, high=2**31 - 1),
    # -- data
    _f("data.path", "bundled:emoji", "'bundled:emoji' or a folder that apt-jax prepare wrote"),
    _f("data.split", "train", "which split of the data set trains"),
    _f("data.frames", (1,), "clip lengths to use; 1 is an image", low=1),
    _f("data.height", 16, "pixels; 0 keeps the stored size", low=0),
    _f("data.width", 16, "pixels; 0 keeps the stored size", low=0),
    _f("data.frame_stride", 1, "take every n-th stored frame of a clip", low=1),
    _f("data.max_text_tokens", 16, "caption tokens kept; longer captions are cut", low=2,
       high=4096),
    _f("data.caption_dropout", 0.1, "part of captions replaced by the empty one", low=0, high=1),
    _f("data.threads", 2, "reader threads per process; 0 reads in line", low=0, high=1024),
    _f("data.prefetch", 2, "batches prepared ahead of the step", low=0, high=1024),
    # -- generator (and the discriminator's backbone)
    _f("model.family", "mmdit", "text and video in two joined streams, or Wan's cross attention",
       choices=("mmdit", "wan")),
    _f("model.in_channels", 3, "channels of a sample (pixels: 3, latents: 16)", low=1),
    _f("model.out_channels", 3, "channels of the velocity", low=1),
    _f("model.patch", (1, 2, 2), "frames, rows, columns of one token", low=1),
    _f("model.width", 128, "channels of the residual stream", low=1),
    _f("model.depth", 4, "number of blocks", low=1),
    _f("model.heads", 4, "attention heads", low=1),
    _f("model.head_dim", 32, "channels of one attention head", low=2),
    _f("model.rope_axes", (8, 12, 12), "rotary channels of frames, rows, columns", low=2),
    _f("model.rope_theta", 10000.0, "rotary base", low=1, open_low=True),
    _f("model.text_width", 384, "channels of the text states", low=1),
    _f("model.text_tokens", 0, "wan: text filled up with zeros to this length (512); 0 as given",
       low=0),
    _f("model.frequency_width", 256, "wan: channels of the sinusoidal time features", low=2),
    _f("model.mlp_ratio", 4.0, "hidden width of the MLPs over width", low=0, open_low=True),
    _f("model.modulation", "per_block", "a projection per block, or one vector with offsets",
       choices=("per_block", "shared")),
    _f("model.dtype", "float32", "dtype of the computation; masters stay float32",
       choices=("float32", "bfloat16")),
    _f("model.matmul", "dtype", "matrix products of the generator's blocks: in model.dtype, or in "
       "eight bits, scaled on the fly (fp8: e4m3 forward, e5m2 gradients)", choices=("dtype", "fp8")),
    _f("model.matmul_kept", 0, "fp8: how many of the last blocks multiply in model.dtype all the same",
       low=0),
    _f("model.attention", "auto", "the attention kernel; auto: the fastest that hardware and shapes "
       "allow", choices=ATTENTION),
    _f("model.remat", "none", "what the backward pass computes anew: nothing, all, all but matrix "
       "products and attention, all but attention, all but attention and its exchange between "
       "devices, or all but "
       "attention with what is kept moved to the host",
       choices=REMATS),
    # -- discriminator
    _f("discriminator.taps", (), "blocks (from 1) with a head; () is 4/9, 13/18 and 1 of the depth",
       low=1),
    _f("discriminator.backbone", "train", "train it, freeze it, or train it at backbone_rate",
       choices=("train", "frozen", "rate")),
    _f("discriminator.backbone_rate", 0.1, "multiplies the backbone's learning rate", low=0),
    _f("discriminator.matmul", "dtype", "the same for its backbone; in eight bits the penalty of "
       "images is mostly rounding (docs/performance.md)", choices=("dtype", "fp8")),
    _f("discriminator.heads", 0, "attention heads of the head blocks; 0 takes model.heads", low=0),
    # -- low-rank adapters
    _f("lora.rank", 0, "train adapters of this rank on the blocks' attention and MLP matrices, the "
       "base frozen; 0 trains all weights", low=0),
    _f("lora.alpha", 0.0, "adapters are scaled by alpha over rank; 0 takes rank", low=0),
    _f("lora.discriminator", False, "adapters on the discriminator's backbone too; its heads train "
       "whole"),
    # -- where networks start
    _f("init.generator", "", "'' from scratch, 'bundled:base', a run folder or a weights folder"),
    _f("init.generator_weights", "ema", "which weights of a run to start from",
       choices=("ema", "raw")),
    _f("init.discriminator", "", "a run of stage adversarial whose D goes on here; '' (the paper): D "
                                 "starts from init.diffusion"),
    _f("init.diffusion", "", "original diffusion weights: the teacher, and D's start"),
    # -- objectives
    _f("objective.flow.shift", 1.0, "time shift of the training t", low=0, open_low=True),
    _f("objective.flow.logit_mean", 0.0, "mean of the logit-normal t"),
    _f("objective.flow.logit_std", 1.0, "deviation of the logit-normal t", low=0, open_low=True),
    _f("objective.consistency.steps", 32, "grid intervals of the teacher", low=1),
    _f("objective.consistency.shift", 1.0, "time shift of the grid", low=0, open_low=True),
    _f("objective.consistency.guidance", 7.5, "constant guidance of the teacher", low=0),
    _f("objective.adversarial.r1", True, "regularise the discriminator on real samples"),
    _f("objective.adversarial.r1_mode", "approximate", "finite difference (the paper) or gradient",
       choices=("approximate", "exact")),
    _f("objective.adversarial.r1_weight", 100.0, "lambda of the penalty", low=0),
    _f("objective.adversarial.r1_sigma", 0.01, "deviation of the perturbation", low=0,
       open_low=True),
    _f("objective.adversarial.time_shift", 1.0, "shift of the discriminator's t", low=0,
       open_low=True),
    _f("objective.adversarial.fixed_time", -1.0, "-1 draws t; 0 to 1 fixes it (0 is the ablation)",
       low=-1, high=1),
    _f("objective.adversarial.loss", "non_saturating", "the pair of GAN losses",
       choices=("non_saturating", "relativistic")),
    _f("objective.adversarial.r2", False, "the same penalty on generated samples"),
    _f("objective.adversarial.translate", 0.0, "small data: D sees every sample moved by up to this "
       "part of its height and width; 0 as it is", low=0, high=0.5),
    _f("objective.adversarial.cutout", 0.0, "small data: D sees every sample with a hole of this "
       "part of its height and width; 0 none", low=0, high=0.9),
    _f("objective.adversarial.color", 0.0, "small data, RGB pixels: D sees every sample in other "
       "brightness, saturation and contrast, by up to this; 0 as it is", low=0, high=1),
    _f("objective.adversarial.augment_after", 0, "small data: finished updates before the first with "
       "color and cutout; 0 has them from the start", low=0, high=2**31 - 1),
    _f("objective.adversarial.mirror", 0.0, "small data: D sees this part of all samples mirrored, left "
       "and right exchanged; 0 none", low=0, high=0.5, open_high=True),
    _f("objective.adversarial.backwards", 0.0, "small data: D sees this part of all clips with the last "
       "frame first; 0 none", low=0, high=0.5, open_high=True),
    # -- optimiser
    _f("optimizer.name", "rmsprop", "rmsprop (the paper's) or adamw", choices=("rmsprop", "adamw")),
    _f("optimizer.learning_rate", 1e-4, "learning rate", low=0, open_low=True),
    _f("optimizer.discriminator_learning_rate", 0.0, "0 takes learning_rate", low=0),
    _f("optimizer.decay", 0.9, "rmsprop's decay", low=0, high=1, open_high=True),
    _f("optimizer.eps", 1e-8, "added to the root of the second moment", low=0, open_low=True),
    _f("optimizer.b1", 0.9, "adamw's first decay", low=0, high=1, open_high=True),
    _f("optimizer.b2", 0.999, "adamw's second decay", low=0, high=1, open_high=True),
    _f("optimizer.weight_decay", 0.0, "adamw's decoupled decay", low=0),
    _f("optimizer.warmup_steps", 0, "steps of linear warm-up", low=0),
    _f("optimizer.final_rate", 1.0, "part of the learning rate left at the last step; it falls "
       "linearly (1: constant, as in the paper)", low=0, high=1),
    # -- loop
    _f("train.steps", 1000, "updates (adversarial: one D and one G step each)", low=1,
       high=2**31 - 1),
    _f("train.batch_size", 64, "samples of one update over all devices", low=1, high=2**20),
    _f("train.clip_batch_size", 0, "the same for clips (more than one frame); 0 takes batch_size",
       low=0, high=2**20),
    _f("train.accumulate", 1, "micro-batches of one update; 0: one sample at a time for each group "
       "of devices that shares one. What does not divide is filled up with samples that do not "
       "count", low=0, high=2**20),
    _f("train.ema_decay", 0.995, "decay of the averaged generator", low=0, high=1),
    _f("train.ema_from_step", 0, "the average follows the weights exactly up to this step", low=0,
       high=2**31 - 1),
    _f("train.log_every", 10, "steps between log lines", low=1),
    _f("train.checkpoint_every", 200, "steps between checkpoints", low=1),
    _f("train.keep", 2, "checkpoints kept", low=1),
    _f("train.hang_seconds", 1800.0, "with several devices: a process whose step takes longer than "
       "this and twice the slowest step so far prints its stacks and exits, to be restarted; 0 never",
       low=0),
    _f("train.first_step_seconds", 3600.0, "the same for the first step of a batch's shape, compiled "
       "meanwhile, and for reading or writing a checkpoint or pictures", low=0),
    _f("train.sample_every", 0, "steps between sample pictures; 0 draws none", low=0),
    _f("train.sample_prompts", ("red heart", "grinning face", "cat face", "red apple"),
       "captions of the sample pictures"),
    # -- devices
    _f("mesh.replica", 1, "copies of the parameters; -1 is the rest of the devices", low=-1),
    _f("mesh.fsdp", -1, "devices that share one copy; -1 is the rest of the devices, with replica "
       "-1 too as many as mesh.copy allows", low=-1),
    _f("mesh.copy", 128, "most devices of one copy where replica and fsdp are both -1", low=1),
    _f("mesh.context", 1, "devices that share one sample's tokens; -1 is the rest", low=-1),
    _f("mesh.tensor", 1, "devices that share each layer's heads and channels; -1 is the rest",
       low=-1),
    _f("mesh.ulysses", -1, "devices of mesh.context that exchange heads, the others pass keys "
       "around a ring; -1 is the most that the heads allow", low=-1),
    # -- sampling
    _f("sample.guidance", 3.0, "guidance of the many-step sampler", low=0),
    _f("sample.steps", 25, "Euler steps", low=1),
    _f("sample.shift", 1.0, "time shift of the Euler grid", low=0, open_low=True),
    _f("sample.two_step_time", 0.5, "t between the two steps", low=0, high=1, open_low=True,
       open_high=True),
    _f("sample.two_step_fresh", False, "fresh noise for the second step instead of the same"),
    _f("sample.fps", 0.0, "frames a second of clips that are written, those of the training data, "
       "0.1 to 1000; 0: 8, and 16 where a VAE makes the frames", low=0, high=1000),
)

BY_KEY: dict[str, Field] = {field.key: field for field in FIELDS}


def base_config() -> ml_collections.ConfigDict:
    """A locked ConfigDict with every field at its default. A config file changes it and returns it.

    Locked: assigning to a name that does not exist raises instead of adding a field.
    """
    config = ml_collections.ConfigDict()
    for field in FIELDS:
        node = config
        *groups, leaf = field.key.split(".")
        for group in groups:
            if group not in node:
                node[group] = ml_collections.ConfigDict()
            node = node[group]
        node[leaf] = field.default
    return config.lock()


def describe_fields() -> str:
    """The table as text for --help: one line a field, with its default and allowed values."""
    lines = []
    for field in FIELDS:
        note = f" ({' | '.join(field.choices)})" if field.choices else ""
        lines.append(f"  --config.{field.key} {field.default!r}\n      {field.help}{note}")
    return "\n".join(lines)
