"""Turn a folder of captioned images and clips into a data set for training.

Reads png, jpg, webp and gif (also animated), mp4, webm, mov and mkv, also inside WebDataset tars
and parquet files. Captions come from metadata.jsonl or metadata.csv in the folder (columns
file_name, text and, if wanted, group), else from a .txt beside each file, or from the archive.
Every file is cropped and resized to the size with the nearest aspect and to the longest clip length
that it fills. Broken files are skipped and listed with the reason in OUT/skipped.jsonl. An
interrupted run continues when the same command is given again; files that a failing disk kept from
being read are tried again by it, too.

Without --vae the data set holds pixels, and the flags below say how. With --vae and --text-encoder
it holds a checkpoint's latents and text states; then --config FILE and --config.key=value say how
(the flags that are named again override them), and OUT/report.json says how fast it went.
"""

from __future__ import annotations

import argparse
import pathlib

from apt_jax.config.preparation import describe_preparation as describe_config

__all__ = ["EXAMPLES", "add_arguments", "describe_config", "run"]

EXAMPLES = """\
  apt-jax prepare --source photos --out data/photos --sizes 64x64 96x64 64x96
  apt-jax prepare --source clips --out data/clips --sizes 64x64 --frames 1 8 16 --fps 8
  apt-jax prepare --source loops --out data/loops --frames 8 --sampling even --holdout 0.2
  apt-jax prepare --source clips --vae ckpt/wan13b --text-encoder ckpt/wan13b \\
      --config configs/wan_1_3b_data.py --to data/clips
  apt-jax prepare --source tars --vae ckpt/wan13b --text-encoder ckpt/wan13b \\
      --config.sizes=720p --config.frames=1,49 --engine ray --workers 16 --to data/clips_720p
"""

# Flags with a default of their own for pixels; for latents the config gives it.
PIXELS = {"sizes": ["64x64"], "frames": [1], "sampling": "consecutive", "fps": 0.0,
          "holdout": 0.05, "background": "white", "max_tokens": 64, "shard_records": 512,
          "negative_prompt": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `apt-jax prepare`."""
    add = parser.add_argument
    add("--source", required=True, metavar="DIR",
        help="the folder with the media and captions, or one .tar or .parquet file")
    add("--out", "--to", required=True, metavar="DIR", dest="out", help="the data set to write")
    add("--name", default="", help="a name for the data set (default: the name of --out)")
    add("--sizes", nargs="+", metavar="WxH",
        help="bucket sizes, width x height in pixels, or 480p, 720p, 1024px (default: 64x64)")
    add("--frames", nargs="+", type=int, metavar="N",
        help="clip lengths in frames; 1 is an image (default: 1)")
    add("--sampling", choices=("consecutive", "even"),
        help="frames from the middle of a clip at --fps, or spread over all of it "
             "(default: consecutive)")
    add("--fps", type=float, metavar="RATE",
        help="frames a second of consecutive sampling, not of even; 0 is the file's own rate (default: 0)")
    add("--holdout", type=float, metavar="PART",
        help="part of the groups kept in the split 'holdout' (default: 0.05)")
    add("--quality", type=int, default=90, metavar="Q", help="WebP quality, 1 to 100 (default: 90)")
    add("--background", metavar="COLOUR",
        help="what lies under transparency: a name or #rrggbb (default: white)")
    add("--max-tokens", type=int, metavar="N",
        help="caption tokens stored; longer captions are cut with a warning (default: 64)")
    add("--negative-prompt", metavar="TEXT",
        help="store the states of this prompt for guidance (default: the empty caption)")
    add("--notice", nargs="*", default=[], metavar="FILE",
        help="licence texts to copy into the data set")
    add("--shard-records", type=int, metavar="N",
        help="files of one shard, the unit of continuing (default: 512)")
    add("--threads", type=int, default=2, metavar="N",
        help="decoding threads of a worker (default: 2)")
    add("--restart", action="store_true", help="throw away what --out holds and start anew")
    add("--quiet", action="store_true", help="no progress bars")
    add("--vae", metavar="DIR", help="store latents of this VAE (apt-jax convert import wrote it)")
    add("--text-encoder", metavar="DIR",
        help="the text encoder of this checkpoint (default: the demo's small one, pixels only)")
    add("--config", metavar="FILE", help="settings of a preparation of latents, a Python file")
    add("--engine", default="local", choices=("local", "ray"),
        help="where to work: this process, or a Ray cluster (default: local)")
    add("--workers", type=int, default=0, metavar="N",
        help="Ray workers (default: one for each GPU, or each node without GPUs)")
    add("--ray-address", default="", metavar="HOST:PORT",
        help="an existing Ray cluster, or 'auto' (default: start one on this machine)")


def run(args: argparse.Namespace) -> int:
    """Prepare, print what was made and what was left out."""
    from apt_jax.data import report
    from apt_jax.data.prepare import REPORT, SKIPPED, prepare
    from apt_jax.data.work import tried_again
    from apt_jax.errors import UserError, disk_errors

    if not args.source or not args.out:
        raise UserError("--source and --out must not be empty; name two folders")
    if args.threads < 1 or args.workers < 0:
        raise UserError(f"--threads {args.threads} must be at least 1, --workers {args.workers} at "
                        "least 0")
    if args.engine == "local" and (args.workers or args.ray_address):
        raise UserError("--workers and --ray-address are for a Ray cluster; add --engine ray")
    if args.vae is None and (args.config or args.overrides):
        raise UserError("--config is about latents; add --vae and --text-encoder, or use the flags")
    if args.vae is not None and args.text_encoder is None:
        raise UserError("--vae needs --text-encoder: the folder of the same checkpoint")
    out = pathlib.Path(args.out)
    settings, dtype = settings_of(args)
    encoder = codec = None
    if args.text_encoder is not None:
        from apt_jax.data.text_encoders import load_text_encoder

        encoder = load_text_encoder(args.text_encoder, dtype)
    if args.vae is not None:
        from apt_jax.data.vae_codec import VaeCodec

        codec = VaeCodec(args.vae, settings.encode_batch, dtype)
    result = prepare(
        args.source, out, settings, encoder=encoder, codec=codec, threads=args.threads,
        restart=args.restart, progress=not args.quiet, engine=args.engine, workers=args.workers,
        address=args.ray_address,
    )
    print(f"{'split':<10}{'frames':>7}{'size':>12}{'records':>10}{'MB':>9}")
    for b in result.buckets:
        size = sum(s.bytes for s in b.shards) / 1e6
        print(f"{b.split:<10}{b.frames:>7}{f'{b.width}x{b.height}':>12}{b.records:>10}{size:>9.1f}")
    if codec is not None and (out / REPORT).is_file():
        print(report.table(report.load(out / REPORT)))
    if result.skipped:
        print(f"{result.skipped} entries were left out; the reasons are in {out / SKIPPED}")
    with disk_errors(out, "read"):
        again = tried_again(out)
    if again:
        print(f"{again} of them could not be read just now; give the same command again to try")
    if "train" in result.splits:
        print(f"train on it with --config.data.path={out}")
    else:
        print("no file of the split 'train' could be used, so there is nothing to train on; mend "
              "those files or add others")
    return 0


def settings_of(args: argparse.Namespace):
    """(Settings, precision of the networks): from flags and, for latents, the config under them."""
    from PIL import ImageColor

    from apt_jax.config.preparation import SAME, load_preparation
    from apt_jax.data.presets import parse_sizes
    from apt_jax.data.settings import Settings
    from apt_jax.errors import UserError

    given = {key: getattr(args, key) for key in PIXELS}
    given = {key: value for key, value in given.items() if value is not None}
    more, dtype = {}, "bfloat16"
    if args.vae is None:
        values = PIXELS | given
    else:
        config = load_preparation(args.config, args.overrides).to_dict()
        values = config | given
        dtype = config["dtype"]
        more = {key: config[key] for key in
                ("min_fps", "clips", "max_enlarge", "text_dtype", "encode_batch")}
        if tuple(config["image_sizes"]) != (SAME,):
            more["image_sizes"] = parse_sizes(config["image_sizes"])
    try:
        background = ImageColor.getrgb(values["background"])[:3]
    except ValueError:
        raise UserError(
            f"--background {values['background']!r} is no colour; write a name or #rrggbb"
        ) from None
    prompt = values["negative_prompt"]
    return Settings(
        name=args.name or pathlib.Path(args.out).resolve().name,
        sizes=parse_sizes(values["sizes"]),
        frames=tuple(sorted(set(values["frames"]))),
        sampling=values["sampling"],
        fps=float(values["fps"]),
        holdout=float(values["holdout"]),
        quality=args.quality,
        background=background,
        max_tokens=values["max_tokens"],
        shard_records=values["shard_records"],
        negative_prompt=None if args.vae is not None and prompt == "" else prompt,
        notices=tuple(args.notice),
        **more,
    ), dtype
