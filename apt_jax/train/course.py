"""What of a config decides the weights that a run ends with, and when a run may not go on.

A field counts unless it is listed here as free, so a new one does. Fields that a stage does not
read are free in it, and a field that the saved config is older than had the schema's default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apt_jax.config.schema import BY_KEY
from apt_jax.errors import UserError
from apt_jax.weights import init_path
from apt_jax.weights.common import BUNDLED

# Config fields that fix the arrays of the state; a change of one is another run.
IDENTITY = ("stage", "optimizer.name", "discriminator.taps", "discriminator.backbone",
            "discriminator.heads", "lora.rank", "lora.alpha", "lora.discriminator")
# Fields of config.model that change how it is computed, not what it is.
COMPUTE_ONLY = ("dtype", "matmul", "matmul_kept", "remat", "attention")

# What leaves the weights as they are, but for rounding: devices, logs, readers, later sampling.
FREE_GROUPS = ("mesh", "sample")
FREE = ("name", "data.threads", "data.prefetch", "model.remat", "train.accumulate",
        "train.log_every", "train.checkpoint_every", "train.keep", "train.hang_seconds",
        "train.first_step_seconds", "train.sample_every", "train.sample_prompts")
OBJECTIVES = {"pretrain": "flow", "consistency": "consistency", "adversarial": "adversarial"}
OTHER_OPTIMIZER = {"adamw": ("optimizer.decay",),
                   "rmsprop": ("optimizer.b1", "optimizer.b2", "optimizer.weight_decay")}
PLACES = ("init.generator", "init.discriminator", "init.diffusion", "data.path")
# Copies of a run, a data set and a weights folder are told by the first of these that both have.
MARKS = ("metrics.jsonl", "manifest.json", "config.json")


def saved_field(config: Any, key: str) -> Any:
    """The field of a run's config; its default where the run is older than the field."""
    for part in key.split("."):
        if part not in config:
            return BY_KEY[key].default
        config = config[part]
    return config


def _counts(key: str, config: Any) -> bool:
    """Whether a field, other than those of the run's identity, moves the weights of its stage."""
    group, _, rest = key.partition(".")
    adversarial = config.stage == "adversarial"
    if key in FREE or key in IDENTITY or group in FREE_GROUPS or key == "train.steps":
        return False
    if group == "model":
        return rest in COMPUTE_ONLY
    if group == "objective":
        return rest.startswith(f"{OBJECTIVES[config.stage]}.")
    if group == "discriminator" or key == "optimizer.discriminator_learning_rate":
        return adversarial and (rest != "backbone_rate" or config.discriminator.backbone == "rate")
    if key == "init.diffusion":
        return config.stage != "pretrain"
    return key not in OTHER_OPTIMIZER[config.optimizer.name]


def _same(key: str, there: Any, here: Any, folder: Path) -> bool:
    if key in PLACES:
        return _same_place(there, here, folder)
    if key == "model.attention":  # all kernels but the one in eight bits agree up to rounding
        return (there == "cudnn_fp8") == (here == "cudnn_fp8")
    return there == here


def _same_place(there: str, here: str, folder: Path) -> bool:
    """Whether two paths, one of a saved config in `folder`, mean one set of weights or data.

    They do under the same name too, where the saved place is gone (it was moved, with the run or
    alone) or the other is a copy of it.
    """
    if there == here:
        return True
    if not there or not here or there.startswith(BUNDLED) or here.startswith(BUNDLED):
        return False
    old, new = Path(init_path(folder, there)).resolve(), Path(here).expanduser().resolve()
    if old == new:
        return True
    if old.name != new.name:
        return False
    if not old.exists():
        return True
    mark = next((m for m in MARKS if (old / m).is_file() and (new / m).is_file()), None)
    return mark is not None and (old / mark).read_bytes() == (new / mark).read_bytes()


def changes(saved: Any, config: Any, step: int, folder: str | Path) -> tuple[str | None, list[str]]:
    """How `config` differs from the one that a checkpoint in run folder `folder` was trained with.

    Args:
      saved, config: whole configs; saved may be older than some fields.
      step: updates that the checkpoint is of.

    Returns:
      The first difference that makes another run of it (None if there is none), and those under
      which other weights come out, each as "key = old there, new here". train.steps is among the
      latter where it is passed already, or where the learning rate falls towards its last step.
    """
    folder = Path(folder)

    def says(key):
        return f"{key} = {saved_field(saved, key)!r} there, {saved_field(config, key)!r} here"

    identity = [key for key in IDENTITY
                if config.stage == "adversarial" or not key.startswith("discriminator")]
    identity += [f"model.{key}" for key in config.model if key not in COMPUTE_ONLY]
    hard = next((says(key) for key in identity
                 if saved_field(saved, key) != saved_field(config, key)), None)
    course = [says(key) for key in BY_KEY if _counts(key, config)
              and not _same(key, saved_field(saved, key), saved_field(config, key), folder)]
    steps = config.train.steps
    falls = saved_field(saved, "optimizer.final_rate") != 1 or config.optimizer.final_rate != 1
    if steps < step or (falls and steps != saved_field(saved, "train.steps")):
        course.append(says("train.steps"))
    return hard, course


def check_course(saved: Any, config: Any, step: int, folder: str | Path) -> list[str]:
    """`changes` as what follows from them: the lines to warn of where the run may go on.

    UserError where it may not: it is another run, or one that is finished and was trained with
    something else than `config` says, which would then stand beside its weights.
    """
    hard, course = changes(saved, config, step, folder)
    if hard:
        raise UserError(f"the checkpoint of step {step} in {folder} is of another config: {hard}; "
                        "use another --workdir, or the config it was trained with")
    if course and step >= config.train.steps:
        raise UserError(f"{folder} is trained to its end (step {step}) with another "
                        f"{', '.join(course)}; use another --workdir, or the old value"
                        f"{'s' if len(course) > 1 else ''}")
    return course
