"""Turn a folder of captioned images and clips into a data set for training.

Reads png, jpg, webp and gif (also animated), mp4, webm, mov and mkv. Captions come from
metadata.jsonl or metadata.csv in the folder (columns file_name, text and, if wanted, group), else
from a .txt beside each file. Every file is cropped and resized to the size with the nearest aspect
and to the longest clip length that it fills. Broken files are skipped and listed with the reason in
OUT/skipped.jsonl. An interrupted run continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import pathlib

EXAMPLES = """\
  apt-jax prepare --source photos --out data/photos --sizes 64x64 96x64 64x96
  apt-jax prepare --source clips --out data/clips --sizes 64x64 --frames 1 8 16 --fps 8
  apt-jax prepare --source loops --out data/loops --frames 8 --sampling even --holdout 0.2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `apt-jax prepare`."""
    add = parser.add_argument
    add("--source", required=True, metavar="DIR", help="the folder with the media and captions")
    add("--out", required=True, metavar="DIR", help="the data set to write")
    add("--name", default="", help="a name for the data set (default: the name of --out)")
    add("--sizes", nargs="+", default=["64x64"], metavar="WxH",
        help="bucket sizes, width x height in pixels (default: 64x64)")
    add("--frames", nargs="+", type=int, default=[1], metavar="N",
        help="clip lengths in frames; 1 is an image (default: 1)")
    add("--sampling", choices=("consecutive", "even"), default="consecutive",
        help="frames from the middle of a clip at --fps, or spread over all of it "
             "(default: consecutive)")
    add("--fps", type=float, default=0.0, metavar="RATE",
        help="frames a second of consecutive sampling; 0 is the file's own rate (default: 0)")
    add("--holdout", type=float, default=0.05, metavar="PART",
        help="part of the groups kept in the split 'holdout' (default: 0.05)")
    add("--quality", type=int, default=90, metavar="Q", help="WebP quality, 1 to 100 (default: 90)")
    add("--background", default="white", metavar="COLOUR",
        help="what lies under transparency: a name or #rrggbb (default: white)")
    add("--max-tokens", type=int, default=64, metavar="N",
        help="caption tokens stored; longer captions are cut with a warning (default: 64)")
    add("--negative-prompt", default=None, metavar="TEXT",
        help="store the states of this prompt for guidance (default: the empty caption)")
    add("--notice", nargs="*", default=[], metavar="FILE",
        help="licence texts to copy into the data set")
    add("--shard-records", type=int, default=512, metavar="N",
        help="files of one shard, the unit of continuing (default: 512)")
    add("--threads", type=int, default=2, metavar="N", help="decoding threads (default: 2)")
    add("--restart", action="store_true", help="throw away what --out holds and start anew")
    add("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Prepare, print what was made and what was left out."""
    from PIL import ImageColor

    from apt_jax.data.buckets import parse_size
    from apt_jax.data.prepare import SKIPPED, Settings, prepare
    from apt_jax.errors import UserError

    try:
        background = ImageColor.getrgb(args.background)[:3]
    except ValueError:
        raise UserError(
            f"--background {args.background!r} is no colour; write a name or #rrggbb"
        ) from None
    out = pathlib.Path(args.out)
    settings = Settings(
        name=args.name or out.resolve().name,
        sizes=tuple(dict.fromkeys(map(parse_size, args.sizes))),
        frames=tuple(sorted(set(args.frames))),
        sampling=args.sampling,
        fps=args.fps,
        holdout=args.holdout,
        quality=args.quality,
        background=background,
        max_tokens=args.max_tokens,
        shard_records=args.shard_records,
        negative_prompt=args.negative_prompt,
        notices=tuple(args.notice),
    )
    result = prepare(
        args.source, out, settings, threads=args.threads, restart=args.restart,
        progress=not args.quiet,
    )
    print(f"{'split':<10}{'frames':>7}{'size':>12}{'records':>10}{'MB':>9}")
    for b in result.buckets:
        size = sum(s.bytes for s in b.shards) / 1e6
        print(f"{b.split:<10}{b.frames:>7}{f'{b.width}x{b.height}':>12}{b.records:>10}{size:>9.1f}")
    if result.skipped:
        print(f"{result.skipped} files were left out; the reasons are in {out / SKIPPED}")
    print(f"train on it with --config.data.path={out}")
    return 0
