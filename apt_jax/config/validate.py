"""Checks of a whole configuration: every field's type and range, and the rules between fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_collections

from apt_jax.config.load import flat_keys, get_key, kind_of, nearest
from apt_jax.config.schema import BY_KEY, FIELDS, Field
from apt_jax.errors import UserError


def validate(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config if every rule holds, else raises UserError with the first broken rule.

    Values are checked, files and devices are not: a config can be checked on any machine.
    """
    _check_keys(config)
    for field in FIELDS:
        check_value(field, get_key(config, field.key))
    for rule in (_data, _model, _family, _discriminator, _matmul, _lora, _stage, _objective, _train,
                 _mesh, _sample):
        rule(config)
    return config


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_keys(config: ml_collections.ConfigDict) -> None:
    present = flat_keys(config)
    for key in present:
        if key not in BY_KEY:  # `nearest` costs more than all other checks: only for the message
            raise UserError(f"unknown config key {key!r}{nearest(key, BY_KEY)}")
    for key in BY_KEY:
        _require(key in present, f"config key {key!r} is missing; start from "
                                 "apt_jax.config.base_config()")


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, float) or type(value) is int
    return type(value) is type(default)


def check_value(field: Field, value: Any) -> None:
    """UserError unless the value has the field's type and lies in its range."""
    default = field.default
    _require(_same_type(value, default),
             f"{field.key} takes {kind_of(field.key, default)}, not {value!r}")
    if field.choices is not None and value not in field.choices:
        raise UserError(f"{field.key} = {value!r} is not one of {', '.join(field.choices)}"
                        f"{nearest(str(value), field.choices)}")
    items = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple):
        item = default[0] if default else 0
        _require(all(_same_type(v, item) for v in value),
                 f"{field.key} takes {kind_of(field.key, default)}, not {value!r}")
    for number in items:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        _require(math.isfinite(number), f"{field.key} = {number} is not finite")
        if field.low is not None:
            sign = ">" if field.open_low else ">="
            good = number > field.low if field.open_low else number >= field.low
            _require(good, f"{field.key} = {value!r} must be {sign} {field.low}")
        if field.high is not None:
            sign = "<" if field.open_high else "<="
            good = number < field.high if field.open_high else number <= field.high
            _require(good, f"{field.key} = {value!r} must be {sign} {field.high}")


def check_kept(config: Any, groups: Sequence[str], source: str) -> None:
    """Checks what a run or a weights folder says of itself, which may be older than a field of today.

    config: a table of groups. groups: those that must be there. source: the file, for UserError.
    Fields that are missing or unknown are passed over; what is known must have its type and range.
    """
    for group in groups:
        _require(hasattr(config.get(group), "keys"),
                 f"{source} has no table {group!r}; copy the file again from where it was written")
    try:
        for field in FIELDS:
            group, name = field.key.split(".", 1) if "." in field.key else ("", field.key)
            if group in groups and name in config[group]:
                check_value(field, config[group][name])
        frames = config["data"].get("frames", (1,)) if "data" in groups else (1,)
        _require(len(frames) > 0, "data.frames is empty")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _data(c: ml_collections.ConfigDict) -> None:
    _require(bool(c.data.path), "data.path is empty; use 'bundled:emoji' or a folder written by "
                                "apt-jax prepare")
    if c.data.path.startswith("bundled:"):
        _require(c.data.path == "bundled:emoji",
                 f"data.path = {c.data.path!r} is not bundled, did you mean 'bundled:emoji'?")
        _require(c.data.max_text_tokens <= 512, f"data.max_text_tokens = {c.data.max_text_tokens} is "
                 "more than the 512 that the text encoder of 'bundled:emoji' takes; use 2 to 512")
    _require(len(c.data.frames) > 0, "data.frames is empty; name at least one clip length, "
                                     "for images (1,)")
    _require(len(set(c.data.frames)) == len(c.data.frames),
             f"data.frames = {c.data.frames} names a length twice")
    _require((c.data.height == 0) == (c.data.width == 0),
             f"data.height = {c.data.height} and data.width = {c.data.width}: set both, or both "
             "to 0 for the stored size")


def _model(c: ml_collections.ConfigDict) -> None:
    m = c.model
    _require(len(m.patch) == 3, f"model.patch = {m.patch} must be (frames, rows, columns)")
    _require(len(m.rope_axes) == 3, f"model.rope_axes = {m.rope_axes} must be "
                                    "(frames, rows, columns)")
    _require(m.heads * m.head_dim == m.width,
             f"model.heads * model.head_dim = {m.heads} * {m.head_dim} = {m.heads * m.head_dim} "
             f"must equal model.width = {m.width}")
    _require(all(axis % 2 == 0 for axis in m.rope_axes),
             f"model.rope_axes = {m.rope_axes} must all be even: rotary channels come in pairs")
    _require(sum(m.rope_axes) == m.head_dim,
             f"model.rope_axes = {m.rope_axes} sum to {sum(m.rope_axes)} and must sum to "
             f"model.head_dim = {m.head_dim}")
    _require(m.in_channels == m.out_channels,
             f"model.in_channels = {m.in_channels} and model.out_channels = {m.out_channels} must "
             "be equal: the velocity has the sample's shape")
    for name, size, patch in (("height", c.data.height, m.patch[1]),
                              ("width", c.data.width, m.patch[2])):
        _require(size % patch == 0, f"data.{name} = {size} is not a multiple of its patch {patch} "
                                    f"(model.patch = {m.patch})")
    for frames in c.data.frames:
        _require(frames % m.patch[0] == 0, f"data.frames = {c.data.frames}: {frames} is not a "
                                           f"multiple of its patch {m.patch[0]} "
                                           f"(model.patch = {m.patch})")


def _family(c: ml_collections.ConfigDict) -> None:
    """What one family of networks fixes; a field that it has no use for must not be set."""
    m, defaults = c.model, {key: BY_KEY[f"model.{key}"].default for key in (
        "modulation", "text_tokens", "frequency_width")}
    unused = ("modulation",) if m.family == "wan" else ("text_tokens", "frequency_width")
    for key in unused:
        _require(m[key] == defaults[key], f"model.{key} = {m[key]!r} has no meaning for "
                                          f"model.family = {m.family!r}; leave it at "
                                          f"{defaults[key]!r}")
    if m.family != "wan":
        return
    side = 2 * (m.head_dim // 6)  # as models/wan/config.py
    axes = (m.head_dim - 2 * side, side, side)
    _require(m.rope_axes == axes, f"model.rope_axes = {m.rope_axes}: Wan cuts a head of "
                                  f"{m.head_dim} channels into {axes}; set that")
    _require(m.frequency_width % 2 == 0, f"model.frequency_width = {m.frequency_width} must be "
                                         "even: cosines and sines come in pairs")
    _require(m.text_tokens == 0 or c.data.max_text_tokens <= m.text_tokens,
             f"data.max_text_tokens = {c.data.max_text_tokens} is more than model.text_tokens = "
             f"{m.text_tokens}")


def _discriminator(c: ml_collections.ConfigDict) -> None:
    d = c.discriminator
    for tap in d.taps:
        _require(tap <= c.model.depth, f"discriminator.taps = {d.taps}: block {tap} is beyond "
                                       f"model.depth = {c.model.depth}")
    _require(list(d.taps) == sorted(set(d.taps)),
             f"discriminator.taps = {d.taps} must rise without repeats")
    _require(d.heads == 0 or c.model.width % d.heads == 0,
             f"discriminator.heads = {d.heads} must divide model.width = {c.model.width}")


def _matmul(c: ml_collections.ConfigDict) -> None:
    _require(c.model.matmul != "fp8" or c.model.matmul_kept < c.model.depth,
             f"model.matmul_kept = {c.model.matmul_kept} leaves none of model.depth = "
             f"{c.model.depth} blocks to multiply in eight bits; keep fewer")


def _lora(c: ml_collections.ConfigDict) -> None:
    if not c.lora.rank:
        _require(not c.lora.discriminator, "lora.discriminator is set but lora.rank = 0; set a rank")
        return
    _require("fp8" not in (c.model.matmul, c.discriminator.matmul),
             "model.matmul or discriminator.matmul = 'fp8' has no adapters; set lora.rank = 0, or "
             "products in model.dtype")
    _require(c.stage == "consistency" or bool(c.init.generator),
             "lora.rank is set, but init.generator names no base for the adapters; give one")
    if c.lora.discriminator and c.stage == "adversarial":
        _require(c.discriminator.backbone != "frozen",
                 "discriminator.backbone = 'frozen' leaves lora.discriminator nothing to train; "
                 "unset one of them")


def _stage(c: ml_collections.ConfigDict) -> None:
    if c.init.discriminator:
        _require(c.stage == "adversarial", f"stage {c.stage} has no discriminator, and "
                 "init.discriminator names a start of one; leave it empty")
        _require(not c.init.discriminator.startswith("bundled:"),
                 f"init.discriminator = {c.init.discriminator!r}: no discriminator is bundled; give "
                 "the folder of an adversarial run, or leave it empty")
        _require(not c.lora.discriminator, "init.discriminator starts a whole discriminator, and "
                 "lora.discriminator trains adapters of one; unset one of them")
    for key in ("generator", "diffusion"):
        value = c.init[key]
        if value.startswith("bundled:"):
            _require(value == "bundled:base",
                     f"init.{key} = {value!r} is not bundled, did you mean 'bundled:base'?")
    if c.stage == "consistency":
        _require(bool(c.init.diffusion), "stage consistency needs init.diffusion: the teacher's "
                                         "weights, e.g. 'bundled:base' or a run folder")
    if c.stage == "adversarial":
        _require(bool(c.init.generator), "stage adversarial needs init.generator: the distilled "
                                         "generator, e.g. the run folder of the consistency stage")
        _require(bool(c.init.diffusion), "stage adversarial needs init.diffusion: the original "
                                         "diffusion weights that start the discriminator")


def _objective(c: ml_collections.ConfigDict) -> None:
    a = c.objective.adversarial
    _require(a.fixed_time == -1 or 0 <= a.fixed_time <= 1,
             f"objective.adversarial.fixed_time = {a.fixed_time} must be -1 (draw t) or lie in "
             "0 to 1")
    _require(a.color == 0 or c.model.in_channels == 3,
             f"objective.adversarial.color = {a.color} changes RGB pixels, and model.in_channels = "
             f"{c.model.in_channels} are none; set it to 0 (translate and cutout work on latents)")
    exact = c.stage == "adversarial" and a.r1 and a.r1_mode == "exact"
    _require(not exact or c.model.attention in ("auto", "oracle", "xla"),
             f"model.attention = {c.model.attention!r} cannot be differentiated twice, which "
             "objective.adversarial.r1_mode = 'exact' needs; use 'auto', 'oracle' or 'xla'")
    _require(not exact or c.discriminator.matmul == "dtype",
             "discriminator.matmul = 'fp8' cannot be differentiated twice, which "
             "objective.adversarial.r1_mode = 'exact' needs; set one of them back")
    _require(not (a.r2 and a.r1_mode == "exact"),
             "objective.adversarial.r2 has no exact form here; set r1_mode to 'approximate'")


def _train(c: ml_collections.ConfigDict) -> None:
    _require(c.train.ema_decay < 1, "train.ema_decay = 1 would never leave the first weights; use "
                                    "less than 1")
    _require(c.train.sample_every == 0 or len(c.train.sample_prompts) > 0,
             "train.sample_every is set but train.sample_prompts is empty")
    _require(c.optimizer.warmup_steps <= c.train.steps,
             f"optimizer.warmup_steps = {c.optimizer.warmup_steps} is longer than train.steps = "
             f"{c.train.steps}")


def _mesh(c: ml_collections.ConfigDict) -> None:
    axes = ("replica", "fsdp", "context", "tensor")
    for key in (*axes, "ulysses"):
        _require(c.mesh[key] != 0, f"mesh.{key} = 0; use a count of devices, or -1 for the rest")
    free = [key for key in axes if c.mesh[key] == -1]
    _require(len(free) <= 1 or free == ["replica", "fsdp"],
             f"{' and '.join(f'mesh.{key}' for key in free)} are "
                             f"{'both' if len(free) == 2 else 'all'} -1; only one can be the rest")


def _sample(c: ml_collections.ConfigDict) -> None:
    # What the files that hold clips can say: a frame of 0.001 to 10 seconds.
    _require(c.sample.fps == 0 or c.sample.fps >= 0.1,
             f"sample.fps = {c.sample.fps} must be 0 (8, or 16 with a VAE) or lie in 0.1 to 1000")
