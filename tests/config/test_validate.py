"""Every rule refuses its breach with one line, and the defaults pass."""

import ml_collections
import pytest

from apt_jax.config import apply_overrides, base_config, validate
from apt_jax.config.schema import FIELDS
from apt_jax.errors import UserError


def check(*overrides):
    config = base_config()
    apply_overrides(config, list(overrides))
    return validate(config)


def test_defaults_pass_for_every_stage():
    check()
    check("stage=consistency", "init.diffusion=bundled:base")
    check("stage=adversarial", "init.diffusion=bundled:base", "init.generator=runs/x")


@pytest.mark.parametrize("overrides, words", [
    (["stage=adverserial"], ["'adverserial'", "did you mean 'adversarial'"]),
    (["optimizer.name=rmsprp"], ["did you mean 'rmsprop'"]),
    (["model.dtype=bf16"], ["did you mean 'bfloat16'"]),
    (["discriminator.taps=5"], ["block 5", "model.depth = 4"]),
    (["discriminator.taps=0,2"], ["discriminator.taps", ">= 1"]),
    (["discriminator.taps=3,2"], ["must rise"]),
    (["discriminator.taps=2,2"], ["must rise"]),
    (["discriminator.heads=3"], ["must divide"]),
    (["model.heads=3"], ["= 96", "model.width = 128"]),
    (["model.rope_axes=8,12,10"], ["sum to 30", "head_dim = 32"]),
    (["model.rope_axes=7,12,13"], ["even"]),
    (["model.rope_axes=16,16"], ["model.rope_axes"]),
    (["model.patch=2,2"], ["model.patch"]),
    (["model.out_channels=6"], ["must be equal"]),
    (["data.height=15"], ["data.height = 15", "patch 2"]),
    (["model.patch=2,2,2"], ["data.frames", "patch 2"]),
    (["data.frames=()"], ["data.frames is empty"]),
    (["data.frames=0,4"], ["data.frames", ">= 1"]),
    (["data.frames=4,4"], ["twice"]),
    (["data.height=0"], ["set both"]),
    (["data.path="], ["data.path is empty"]),
    (["data.path=bundled:emojis"], ["did you mean 'bundled:emoji'"]),
    (["init.generator=bundled:bas"], ["did you mean 'bundled:base'"]),
    (["data.caption_dropout=1.5"], ["data.caption_dropout", "<= 1"]),
    (["train.batch_size=0"], ["train.batch_size", ">= 1"]),
    (["train.batch_size=99999999999"], ["train.batch_size", "<= 1048576"]),
    (["train.clip_batch_size=99999999999"], ["train.clip_batch_size", "<= 1048576"]),
    (["data.prefetch=1000000000"], ["data.prefetch", "<= 1024"]),
    (["data.threads=1000000000"], ["data.threads", "<= 1024"]),
    (["data.max_text_tokens=1"], ["data.max_text_tokens", ">= 2"]),
    (["data.max_text_tokens=600"], ["data.max_text_tokens = 600", "use 2 to 512"]),
    (["data.max_text_tokens=5000", "data.path=elsewhere"], ["data.max_text_tokens", "<= 4096"]),
    (["sample.fps=1e-5"], ["sample.fps = 1e-05", "0.1 to 1000"]),
    (["sample.fps=1e6"], ["sample.fps", "<= 1000"]),
    (["train.ema_decay=1"], ["train.ema_decay"]),
    (["train.sample_every=5", "train.sample_prompts="], ["sample_prompts is empty"]),
    (["optimizer.learning_rate=0"], ["optimizer.learning_rate", "> 0"]),
    (["optimizer.learning_rate=inf"], ["not finite"]),
    (["optimizer.decay=1"], ["optimizer.decay", "< 1"]),
    (["optimizer.b1=1"], ["optimizer.b1", "< 1"]),
    (["optimizer.b2=1"], ["optimizer.b2", "< 1"]),
    (["optimizer.warmup_steps=5000"], ["longer than train.steps"]),
    (["objective.adversarial.r1_sigma=0"], ["r1_sigma", "> 0"]),
    (["objective.adversarial.fixed_time=-0.5"], ["fixed_time"]),
    (["objective.adversarial.fixed_time=1.1"], ["fixed_time", "<= 1"]),
    (["objective.adversarial.time_shift=0"], ["time_shift"]),
    (["sample.two_step_time=0"], ["two_step_time"]),
    (["sample.two_step_time=1"], ["two_step_time", "< 1"]),
    (["mesh.fsdp=0"], ["mesh.fsdp = 0"]),
    (["mesh.context=-1"], ["only one"]),
    (["stage=consistency"], ["init.diffusion"]),
    (["stage=adversarial", "init.diffusion=bundled:base"], ["init.generator"]),
    (["stage=adversarial", "init.generator=runs/x"], ["init.diffusion"]),
])
def test_a_broken_rule_is_one_line(overrides, words):
    with pytest.raises(UserError) as error:
        check(*overrides)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_every_bound_of_the_schema_is_checked():
    for field in FIELDS:
        for bound, step in ((field.low, -1), (field.high, +1)):
            if bound is None:
                continue
            config = base_config()
            value = type(field.default)((bound + step,)) if isinstance(field.default, tuple) else (
                type(field.default)(bound + step))
            node = config
            *groups, leaf = field.key.split(".")
            for group in groups:
                node = node[group]
            node[leaf] = value
            with pytest.raises(UserError, match=leaf):
                validate(config)


def test_unknown_missing_and_mistyped_fields_of_foreign_configs():
    config = base_config().unlock()
    config.trian = ml_collections.ConfigDict({"steps": 3})
    with pytest.raises(UserError, match="'trian.steps', did you mean 'train.steps'"):
        validate(config)
    config = base_config().unlock()
    del config.train["steps"]
    with pytest.raises(UserError, match="'train.steps' is missing"):
        validate(config)
    config = base_config().unlock()
    with config.ignore_type():
        config.train.steps = "many"
    with pytest.raises(UserError, match="train.steps takes a whole number, not 'many'"):
        validate(config)
    with config.ignore_type():
        config.train.steps = 3
        config.discriminator.taps = (1, "two")
    with pytest.raises(UserError, match="discriminator.taps takes whole numbers"):
        validate(config)
    with config.ignore_type():
        config.discriminator.taps = ()
        config.data.threads = True
    with pytest.raises(UserError, match="data.threads takes a whole number, not True"):
        validate(config)
