"""Takes PyTorch checkpoints in and gives one-step diffusers folders out.

  import   a diffusers folder (Wan 2.1 text-to-video, Qwen-Image) -> a component folder, which
           init.diffusion, init.generator, apt-jax prepare and apt-jax sample read
  export   a run or weights -> a diffusers folder that from_pretrained loads: transformer, scheduler
           for one and two steps, the base's other components, model card

Neither needs torch. What is written appears whole or not at all.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

EXAMPLES = """\
  apt-jax convert import --source ./Wan2.1-T2V-1.3B-Diffusers --to ckpt/wan13b
  apt-jax convert import --source Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to ckpt/wan13b
  apt-jax convert export --checkpoint runs/apt_video --to ./wan13b-one-step
  apt-jax convert export --checkpoint runs/apt_video --to ./raw --weights raw --dtype bfloat16
  apt-jax convert import --source ./Wan2.1-T2V-1.3B-Diffusers --lora style.safetensors --to ckpt/x
  apt-jax convert export --checkpoint runs/apt_lora --adapters --to ./wan13b-one-step-lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `apt-jax convert`."""
    parser.add_argument("direction", choices=("import", "export"), help="which way")
    add = parser.add_argument_group("both").add_argument
    add("--to", required=True, metavar="DIR", help="the folder to write")
    add("--overwrite", action="store_true", help="replace what convert wrote into --to earlier")
    add("--copy", action="store_true",
        help="copy the files that are not converted, where they would be hard-linked")
    add("--quiet", action="store_true", help="no progress output")
    add = parser.add_argument_group("import").add_argument
    add("--source", metavar="PATH",
        help="a diffusers folder (a pipeline, or a transformer alone), or a hub id like org/name")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)")
    add("--lora", metavar="FILE",
        help="merge this LoRA (names of diffusers or of the original Wan) into the transformer")
    add("--lora-scale", type=float, default=1.0, metavar="S",
        help="how strongly --lora is merged (default: 1)")
    add = parser.add_argument_group("export").add_argument
    add("--checkpoint", metavar="PATH", help="a run folder, a component folder, a weights folder")
    add("--weights", choices=("ema", "raw"), default="ema",
        help="averaged or raw weights of a run (default: ema)")
    add("--base", metavar="DIR",
        help="the component folder with the other components (default: where the run began)")
    add("--dtype", choices=("source", "float32", "bfloat16", "float16"), default="source",
        help="of the tensors written (default: source, as the base's were)")
    add("--adapters", action="store_true",
        help="of a run with lora.rank: write its LoRA alone, for pipe.load_lora_weights (default: "
             "a pipeline with it merged)")
    add("--two-step-time", type=float, metavar="T",
        help="t between two steps, fixed by the scheduler's shift (default: the run's "
             "sample.two_step_time)")
    add("--shard-gb", type=float, default=5.0, metavar="GB",
        help="larger weights become several files with an index (default: 5)")


_IMPORT = {"source": None, "revision": None, "lora": None, "lora_scale": 1.0}
_EXPORT = {"checkpoint": None, "weights": "ema", "base": None, "dtype": "source",
           "adapters": False, "two_step_time": None, "shard_gb": 5.0}
_NOT_ADAPTERS = ("base", "dtype", "two_step_time", "shard_gb", "copy")


def _check(args: argparse.Namespace) -> None:
    """UserError for a flag that is missing, or that the asked work would not heed."""
    from apt_jax.errors import UserError

    def given(flags):
        return [f"--{name.replace('_', '-')}" for name, usual in flags.items()
                if getattr(args, name) != usual]

    here, there = (_IMPORT, _EXPORT) if args.direction == "import" else (_EXPORT, _IMPORT)
    main = f"--{next(iter(here))}"
    if foreign := given(there):
        other = "export" if args.direction == "import" else "import"
        raise UserError(f"{' and '.join(foreign)} are of apt-jax convert {other}; "
                        f"{args.direction} takes {main}")
    if not given(here) or given(here)[0] != main:
        what = "a diffusers folder or a hub id" if main == "--source" else "a run folder"
        raise UserError(f"apt-jax convert {args.direction} needs {main}; give {what}")
    if args.adapters and (idle := given({name: _EXPORT.get(name, False)
                                         for name in _NOT_ADAPTERS})):
        raise UserError(f"{' and '.join(idle)} do not apply to --adapters, which writes the LoRA "
                        "alone; leave them out")
    if args.lora_scale != 1.0 and not args.lora:
        raise UserError("--lora-scale says how strongly --lora is merged; give both")
    if not math.isfinite(args.lora_scale):
        raise UserError(f"--lora-scale {args.lora_scale} must be a finite number")
    if not 0 < args.shard_gb < math.inf:
        raise UserError(f"--shard-gb {args.shard_gb} must be a finite number above 0")


def run(args: argparse.Namespace) -> int:
    """Converts, prints where the result is."""
    from apt_jax.errors import disk_errors

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    _check(args)
    with disk_errors(args.source or args.checkpoint, "read"):
        folder = _convert(args, say)
    print(f"wrote {folder}")
    return 0


def _convert(args: argparse.Namespace, say: Callable[[str], None]) -> Path:
    if args.direction == "import":
        from apt_jax.convert.importing import import_folder

        return import_folder(args.source, args.to, revision=args.revision,
                             overwrite=args.overwrite, copy=args.copy, lora=args.lora,
                             lora_scale=args.lora_scale, say=say)
    if args.adapters:
        from apt_jax.convert.adapters import export_adapters

        return export_adapters(args.checkpoint, args.to, weights=args.weights,
                               overwrite=args.overwrite, command=_command(args))
    from apt_jax.convert.exporting import export_folder

    return export_folder(args.checkpoint, args.to, weights=args.weights, base=args.base,
                         dtype=args.dtype, two_step_time=args.two_step_time,
                         shard_bytes=int(args.shard_gb * 1e9), overwrite=args.overwrite,
                         copy=args.copy, command=_command(args), say=say)


def _command(args: argparse.Namespace) -> str:
    """The command for the model card: the flags that change the result."""
    words = ["apt-jax", "convert", "export", "--checkpoint", args.checkpoint, "--to", args.to,
             "--weights", args.weights, "--dtype", args.dtype]
    words += ["--adapters"] * args.adapters
    for flag, value in (("--base", args.base), ("--two-step-time", args.two_step_time)):
        if value is not None:
            words += [flag, str(value)]
    return shlex.join(words)
