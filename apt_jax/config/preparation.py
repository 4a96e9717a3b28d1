"""The fields of a preparation config: what `apt-jax prepare --config FILE` reads.

A config file starts from `base_preparation_config()` and changes fields, like a training config:

    from apt_jax.config.preparation import base_preparation_config

    def get_config():
        config = base_preparation_config()
        config.sizes = ("480p",)
        return config
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_collections

from apt_jax.config.load import flat_keys, load_config, nearest
from apt_jax.config.schema import Field
from apt_jax.config.validate import check_value
from apt_jax.errors import UserError

SAME = "same"  # of image_sizes: as sizes

FIELDS: tuple[Field, ...] = (
    Field("sizes", ("480p",), "bucket sizes: 480p, 720p, 1024px, or WIDTHxHEIGHT in pixels"),
    Field("image_sizes", (SAME,), "the same for single frames; 'same' takes sizes"),
    Field("frames", (1, 49), "clip lengths in frames, 1 + 4 k; 1 is an image", low=1),
    Field("sampling", "consecutive", "frames at fps, or spread over all of a clip",
          choices=("consecutive", "even")),
    Field("fps", 24.0, "frames a second after resampling; 0 keeps each file's own", low=0),
    Field("min_fps", 0.0, "leave out slower videos", low=0),
    Field("clips", 0, "most windows cut from one file; 0 takes all that fit", low=0),
    Field("max_enlarge", 0.0, "leave out files that would grow by more; 0 takes all", low=0),
    Field("holdout", 0.05, "part of the groups kept in the split 'holdout'", low=0, high=1,
          open_high=True),
    Field("background", "white", "what lies under transparency: a name or #rrggbb"),
    Field("max_tokens", 512, "caption tokens stored; longer captions are cut", low=2),
    Field("text_dtype", "bfloat16", "how text states are stored", choices=("bfloat16", "int8")),
    Field("negative_prompt", "", "the teacher's negative prompt, encoded once; '' stores none"),
    Field("shard_records", 64, "records of one shard, the unit of continuing", low=1),
    Field("encode_batch", 1, "samples of one VAE call on each device", low=1),
    Field("dtype", "bfloat16", "precision of the VAE and the text encoder",
          choices=("bfloat16", "float32")),
)
BY_KEY = {field.key: field for field in FIELDS}


def base_preparation_config() -> ml_collections.ConfigDict:
    """A locked ConfigDict with every field at its default."""
    return ml_collections.ConfigDict({f.key: f.default for f in FIELDS}).lock()


def load_preparation(path: str | Path | None, overrides: Sequence[str] = ()
                     ) -> ml_collections.ConfigDict:
    """The config of a file (None: the defaults) with overrides applied, checked.

    UserError in one line for whatever is wrong, naming the nearest right key.
    """
    if path is None:
        from apt_jax.config.load import apply_overrides

        config = base_preparation_config()
        apply_overrides(config, overrides)
    else:
        config = load_config(path, overrides, keys=list(BY_KEY))
    for key in flat_keys(config):
        if key not in BY_KEY:
            raise UserError(f"unknown key {key!r} of a preparation config{nearest(key, BY_KEY)}")
    for key, field in BY_KEY.items():
        if key not in config:
            raise UserError(f"preparation config key {key!r} is missing; start from "
                            "apt_jax.config.preparation.base_preparation_config()")
        check_value(field, config[key])
    return config


def describe_preparation() -> str:
    """The table as text for --help."""
    lines = []
    for field in FIELDS:
        note = f" ({' | '.join(field.choices)})" if field.choices else ""
        lines.append(f"  --config.{field.key} {field.default!r}\n      {field.help}{note}")
    return "\n".join(lines)
