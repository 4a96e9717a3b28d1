"""The bundled emoji data set: counts, split, captions, size, and the script that made it."""

import collections
import importlib.util
import pathlib

import pytest

from apt_jax.data import manifest
from apt_jax.data.bundled import resolve
from apt_jax.data.pipeline import open_dataset

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records():
    found = []
    for split in ("train", "holdout"):
        dataset = open_dataset("bundled:emoji", split, frames=(1, 8))
        found += [(split, dataset.record(i)) for i in range(dataset.records)]
    return found


def test_counts(records):
    counts = collections.Counter((s, r.frames) for s, r in records)
    assert counts["train", 1] + counts["holdout", 1] == 1868
    assert counts["train", 8] + counts["holdout", 8] == 734
    assert 0.17 < counts["holdout", 1] / 1868 < 0.23
    assert 0.17 < counts["holdout", 8] / 734 < 0.23
    assert all((r.height, r.width) == (64, 64) for _, r in records)


def test_one_emoji_is_in_one_split_as_image_and_as_clip(records):
    where, by_file = {}, {}
    for split, record in records:
        assert where.setdefault(record.group, split) == split
        name = record.source.split("/")[1]
        assert by_file.setdefault(name, split) == split
    holdout = {r.caption for s, r in records if s == "holdout"}
    train = {r.caption for s, r in records if s == "train"}
    assert not holdout & train


def test_no_skin_tone_and_plain_captions(records):
    for _, record in records:
        assert "skin tone" not in record.caption and record.caption.strip(":_") == record.caption
        assert not any(f"1f3f{tone}" in record.source for tone in "bcdef")


def test_files_are_small_and_carry_their_notice():
    folder = resolve("bundled:emoji")
    assert all(p.stat().st_size < 8 * 2**20 for p in folder.iterdir())
    assert manifest.load(folder).notices == ("NOTICE",)
    notice = (folder / "NOTICE").read_text()
    assert "Microsoft" in notice and "MIT" in notice and "Unicode" in notice
    assert notice == (ROOT / "launch/emoji_pack/NOTICE").read_text()


def load_script():
    spec = importlib.util.spec_from_file_location("make_pack", ROOT / "launch/make_emoji_pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("same", [
    ("1f468-200d-1f680", "1f469-200d-1f680", "1f9d1-200d-1f680"),  # astronauts
    ("1f3c3", "1f3c3-200d-2642-fe0f", "1f3c3-200d-2640-fe0f", "1f3c3-200d-27a1-fe0f"),  # runners
    ("1f46a", "1f468-200d-1f469-200d-1f466", "1f469-200d-1f467-200d-1f467"),  # families
    ("1f385", "1f936", "1f9d1-200d-1f384"),  # Claus
    ("1f491", "1f469-200d-2764-fe0f-200d-1f468"),
    ("1f48f", "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468"),
    ("0023-fe0f-20e3", "23-fe0f-20e3"),
])
def test_variants_share_their_base(same):
    script = load_script()
    assert len({script.base(script.codepoints(f"{name}.webp")) for name in same}) == 1


def test_different_emoji_have_different_bases():
    script = load_script()
    names = ("1f600", "2764-fe0f", "2764-fe0f-200d-1f525", "1f468-200d-1f680", "1f468-200d-1f692",
             "1f1e9-1f1ea", "1f1eb-1f1f7", "1f468", "1f466", "1f474")
    assert len({script.base(script.codepoints(n)) for n in names}) == len(names)
