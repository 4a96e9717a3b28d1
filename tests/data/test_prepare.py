"""Preparation end to end on tiny media, with broken files, interruptions and settings."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_media as tiny

from apt_jax.data import decode, manifest, prepare, records
from apt_jax.data.pipeline import batches, load_all, open_dataset
from apt_jax.errors import UserError

SETTINGS = prepare.Settings(name="tiny", sizes=((16, 16), (16, 24)), frames=(1, 4), holdout=0.3,
                            shard_records=4, max_tokens=8)


def run(source, out, settings=SETTINGS, encoder=None, **options):
    return prepare.prepare(source, out, settings, encoder=encoder or tiny.HashEncoder(),
                           progress=False, **options)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def media_folder(root):
    """Images and clips of several kinds and shapes, three of them broken."""
    root.mkdir()
    rows = []
    for i in range(10):
        tiny.save_image(root / f"wide{i}.png", i, 20, 30)
        rows.append((f"wide{i}.png", f"wide picture {i}", f"group {i // 2}"))
    for i in range(5):
        tiny.save_image(root / f"square{i}.jpg", i, 20, 20)
        rows.append((f"square{i}.jpg", f"square picture {i}"))
    tiny.save_animation(root / "loop.webp", 9)
    tiny.save_animation(root / "loop.gif", 6)
    tiny.save_video(root / "film.mp4", 12)
    tiny.save_video(root / "short.mp4", 3)
    whole = (root / "square0.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "rubbish.png").write_bytes(b"rubbish" * 30)
    (root / "empty.mp4").write_bytes(b"")
    rows += [(n, f"about {n}") for n in (
        "loop.webp", "loop.gif", "film.mp4", "short.mp4", "cut.jpg", "rubbish.png", "empty.mp4")]
    tiny.write_table(root, rows)
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepare")
    run(media_folder(root / "in"), root / "out")
    return root


def test_everything_usable_is_there_and_the_rest_is_listed(prepared):
    result = manifest.load(prepared / "out", check_hashes=True)
    skipped = [json.loads(line) for line in open(prepared / "out" / prepare.SKIPPED)]
    assert [s["name"] for s in skipped] == ["cut.jpg", "empty.mp4", "rubbish.png"]
    assert all(s["reason"] for s in skipped) and result.skipped == 3
    assert sum(result.splits.values()) == 10 + 5 + 4
    shapes = {(b.frames, b.height, b.width) for b in result.buckets}
    assert shapes == {(1, 16, 16), (1, 16, 24), (4, 16, 16), (4, 16, 24)}
    assert all(s.records <= 4 for b in result.buckets for s in b.shards)
    assert not (prepared / "out" / prepare.WORK).exists()


def all_records(out):
    for split in manifest.load(out).splits:
        dataset = open_dataset(out, split, frames=sorted(
            {b.frames for b in manifest.load(out).buckets if b.split == split}))
        for i in range(dataset.records):
            yield split, dataset.record(i)


def test_groups_stay_together_and_records_are_whole(prepared):
    where = {}
    for split, record in all_records(prepared / "out"):
        assert where.setdefault(record.group, split) == split
        frames = record.decode()
        assert frames.shape == (record.frames, record.height, record.width, 3)
        assert (record.fps > 0) == (record.frames > 1)
        want, mask = tiny.HashEncoder().encode([record.caption], 8)
        step = record.text_scales[:, None]
        assert (np.abs(record.text() - want[0, mask[0]]) <= 0.5001 * step).all()
    assert set(where.values()) == {"train", "holdout"}


def test_clips_hold_the_right_frames(prepared):
    found = {r.source: r for _, r in all_records(prepared / "out")}
    grey = {n: [round(float(f.mean()) / 20) for f in r.decode()] for n, r in found.items()}
    assert grey["loop.webp"] == [2, 3, 4, 5]  # the middle 4 of 9
    assert grey["film.mp4"] == [4, 5, 6, 7]
    assert found["short.mp4"].frames == 1  # too short for 4: an image
    assert found["film.mp4"].fps == pytest.approx(10)


def test_it_trains(prepared):
    dataset = open_dataset(prepared / "out", "train", frames=(1,), height=8, width=8,
                           max_text_tokens=4)
    batch = next(batches(dataset, batch_size=4, seed=0))
    assert batch["x"].shape == (4, 1, 8, 8, 3) and batch["text"].shape == (4, 4, 12)
    stored = open_dataset(prepared / "out", "train", frames=(1,))
    assert len(stored.shapes) == 2  # as stored: two aspects, two buckets
    with pytest.raises(UserError, match="2 shapes"):
        load_all(stored)


@pytest.mark.parametrize("stop", ["scan", "shard", "after shard"])
@pytest.mark.parametrize("at", [2, 7])
def test_interrupted_and_continued_ends_with_the_same_bytes(
    prepared, tmp_path, monkeypatch, stop, at
):
    calls = 0

    def interrupting(real):
        def work(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        return work

    with monkeypatch.context() as patch:
        if stop == "scan":
            patch.setattr(decode, "probe", interrupting(decode.probe))
        elif stop == "shard":
            patch.setattr(decode, "read", interrupting(decode.read))
        else:
            at = min(at, 3)
            patch.setattr(records, "write_shard", interrupting(records.write_shard))
        with pytest.raises(KeyboardInterrupt):
            run(prepared / "in", tmp_path / "out", threads=1)
    assert not (tmp_path / "out" / manifest.FILE).exists()
    encoder = tiny.HashEncoder()
    run(prepared / "in", tmp_path / "out", encoder=encoder, threads=2)
    assert files(tmp_path / "out") == files(prepared / "out")
    if stop == "after shard":  # the three finished shards were kept
        fresh = tiny.HashEncoder()
        run(prepared / "in", tmp_path / "fresh", encoder=fresh)
        assert encoder.calls == fresh.calls - at


def test_a_finished_folder_is_left_alone_and_another_is_refused(prepared, tmp_path):
    run(prepared / "in", tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    run(prepared / "in", tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    other = dataclasses.replace(SETTINGS, quality=50)
    with pytest.raises(UserError, match="--restart"):
        run(prepared / "in", tmp_path / "out", other)
    (tmp_path / "out" / "mine.md").write_text("not yours")
    run(prepared / "in", tmp_path / "out", other, restart=True)
    assert (tmp_path / "out" / "mine.md").exists()
    assert manifest.load(tmp_path / "out").made["quality"] == 50


def test_work_begun_with_other_files_is_refused(tmp_path, monkeypatch):
    source, real = tiny.image_folder(tmp_path / "in", 6), records.write_shard
    left = []

    def stop_after(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*args)

    monkeypatch.setattr(records, "write_shard", stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    tiny.save_image(source / "p000.png", 40, 30, 20)  # nothing is written yet: begin with these
    tiny.image_folder(source, 7)
    left.append(1)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    tiny.image_folder(source, 8)
    with pytest.raises(UserError, match="begun with other files"):
        run(source, tmp_path / "out")
    monkeypatch.undo()
    made = run(source, tmp_path / "out", restart=True)
    assert sum(made.splits.values()) == 8


def test_even_sampling_negative_prompt_and_notice(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    tiny.save_animation(source / "a.webp", 12, duration=100)
    tiny.write_table(source, [("a.webp", "a loop")])
    (tmp_path / "LICENCE").write_text("free")
    settings = dataclasses.replace(
        SETTINGS, frames=(4,), sampling="even", holdout=0.0, negative_prompt="blurry picture",
        notices=(str(tmp_path / "LICENCE"),))
    result = run(source, tmp_path / "out", settings)
    assert result.notices == ("LICENCE",) and (tmp_path / "out/LICENCE").read_text() == "free"
    dataset = open_dataset(tmp_path / "out", "train", frames=(4,))
    record = dataset.record(0)
    assert [round(float(f.mean()) / 20) for f in record.decode()] == [0, 3, 6, 9]
    assert record.fps == pytest.approx(10 * 4 / 12)
    assert dataset.negative_mask.sum() == 3 and dataset.null_mask.sum() == 1


def test_a_lower_rate_thins_the_frames(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    tiny.save_video(source / "a.mp4", 12, rate=20)
    tiny.write_table(source, [("a.mp4", "a film")])
    settings = dataclasses.replace(SETTINGS, frames=(4,), fps=10.0, holdout=0.0)
    run(source, tmp_path / "out", settings)
    record = open_dataset(tmp_path / "out", "train", frames=(4,)).record(0)
    assert [round(float(f.mean()) / 20) for f in record.decode()] == [2, 4, 6, 8]
    assert record.fps == pytest.approx(10)


def test_some_group_is_left_to_train_on(tmp_path):
    """Of few files the hash may hold out all; a data set without 'train' would be of no use."""
    source = tiny.image_folder(tmp_path / "in", 2)
    result = run(source, tmp_path / "out", dataclasses.replace(SETTINGS, holdout=0.999999))
    assert result.splits == {"train": 1, "holdout": 1}
    tiny.write_table(source, [(f"p00{i}.png", "x", "one group") for i in range(2)])
    result = run(source, tmp_path / "one", dataclasses.replace(SETTINGS, holdout=0.999999))
    assert result.splits == {"train": 2}


def test_another_data_set_says_what_differs(tmp_path):
    source = tiny.image_folder(tmp_path / "in", 2)
    (source / "broken.png").write_bytes(b"rubbish")
    (source / "broken.txt").write_text("x")
    run(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another data set \(quality 90 there, 80 now\); cho"):
        run(source, tmp_path / "out", dataclasses.replace(SETTINGS, quality=80))
    tiny.save_image(source / "more.png")
    (source / "more.txt").write_text("one more")
    with pytest.raises(UserError, match=r"\(3 files there, 4 now\)"):
        run(source, tmp_path / "out")
    (source / "more.png").unlink()
    (source / "broken.txt").write_text("y")
    with pytest.raises(UserError, match="other files, captions or groups"):
        run(source, tmp_path / "out")


def test_the_source_is_not_the_output(tmp_path):
    source = tiny.image_folder(tmp_path / "in", 1)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="both the source and the output"):
        run(source, tmp_path / "link")
    assert len(list(source.iterdir())) == 2


def test_empty_captions_and_strong_enlargements_are_told(tmp_path, caplog):
    source = tiny.image_folder(tmp_path / "in", 2)
    (source / "metadata.jsonl").unlink()
    tiny.save_image(source / "p001.png", 0, 1, 1)
    (source / "p000.txt").write_text(" \n")
    (source / "p001.txt").write_text("a dot")
    run(source, tmp_path / "out")
    assert [r.getMessage() for r in caplog.records] == [
        "1 of 2 files had an empty caption (the first: p000.png)",
        "1 of 2 files had to be enlarged more than 4 times (the first: p001.png, 1x1 to 16x16)"]


def test_nothing_usable(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(b"rubbish")
    tiny.write_table(source, [("a.png", "x")])
    with pytest.raises(UserError, match="nothing in .* could be used"):
        run(source, tmp_path / "out")


def test_images_are_left_out_where_only_clips_are_wanted(tmp_path):
    source = tiny.image_folder(tmp_path / "in", 2)
    with pytest.raises(UserError, match="fewer than the shortest clip"):
        run(source, tmp_path / "out", dataclasses.replace(SETTINGS, frames=(4,)))


@pytest.mark.parametrize("change", [
    {"sizes": ()}, {"frames": (0,)}, {"holdout": 1.0}, {"quality": 0}, {"fps": -1.0},
    {"sampling": "odd"}, {"shard_records": 0}, {"max_tokens": 1}, {"notices": ("/no/file",)},
])
def test_settings_are_checked(tmp_path, change):
    with pytest.raises(UserError, match="prepare:.*; give "):
        run(tmp_path, tmp_path / "out", dataclasses.replace(SETTINGS, **change))


def test_a_rate_for_even_sampling_is_refused(tmp_path):
    settings = dataclasses.replace(SETTINGS, sampling="even", fps=8.0)
    with pytest.raises(UserError, match="fps = 8 has no meaning with sampling = even"):
        run(tmp_path, tmp_path / "out", settings)


@pytest.mark.parametrize("change", [{"sizes": ((16384, 16),)}, {"frames": (1, 1_100_000)}])
def test_clips_that_fit_no_picture_are_refused_before_any_work(tmp_path, change):
    with pytest.raises(UserError, match="do not fit one WebP"):
        run(tmp_path, tmp_path / "out", dataclasses.replace(SETTINGS, **change))
