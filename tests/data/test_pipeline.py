"""From the bundled shards to batches: counts, resumption, padding, dropout, mixed shapes."""

import collections
import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from tiny_media import share

from apt_jax.data import bundled, records
from apt_jax.data.pipeline import batches, load_all, open_dataset, plan_of, to_unit
from apt_jax.errors import UserError


@pytest.fixture(scope="module")
def mixed():
    """The held-out images and clips at 8 px: 341 and 128 records."""
    return open_dataset("bundled:emoji", "holdout", frames=(1, 4), height=8, width=8)


@pytest.fixture(scope="module")
def clips():
    return open_dataset("bundled:emoji", "holdout", frames=(4,), height=8, width=8,
                        caption_dropout=0.0)


def take(dataset, count, **options):
    options = {"batch_size": 16, "seed": 7, **options}
    return list(itertools.islice(batches(dataset, **options), count))


def numbers(part):
    found = np.concatenate([b["index"] for b in part])
    return found[found >= 0].tolist()


def test_batches_have_the_promised_shapes(mixed):
    shapes = set()
    for batch in take(mixed, 8):
        assert batch["x"].dtype == np.float32 and abs(batch["x"]).max() <= 1
        assert batch["text"].shape == (16, 16, 384) and batch["text"].dtype == np.float32
        assert batch["text_mask"].shape == (16, 16) and batch["text_mask"].dtype == bool
        assert batch["loss_mask"].dtype == np.float32 and batch["index"].dtype == np.int32
        assert not batch["text"][~batch["text_mask"]].any()
        assert batch["text_mask"].any(axis=1).all()  # padding samples too
        shapes.add(batch["x"].shape)
    assert shapes == {(16, 1, 8, 8, 3), (16, 4, 8, 8, 3)}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_has_every_record_once(mixed, processes):
    steps = plan_of(mixed, 16, 7).batches_per_epoch
    found = []
    for process in range(processes):
        part = take(mixed, steps, rows=share(process, processes),
                    threads=process % 3)
        assert all(len(b["index"]) == 16 // processes for b in part)
        found += numbers(part)
    assert sorted(found) == list(range(mixed.records))


def test_resumed_with_other_processes_and_threads_nothing_is_lost_or_doubled(mixed):
    steps = plan_of(mixed, 16, 7).batches_per_epoch
    cut = steps // 3
    found = numbers(take(mixed, cut, threads=3, prefetch=5))
    for process in range(4):
        found += numbers(take(mixed, steps - cut, start_step=cut, rows=share(process, 4), threads=1))
    assert sorted(found) == list(range(mixed.records))


def test_a_process_reads_the_rows_that_it_names(mixed):
    (whole,) = take(mixed, 1)
    named = np.array([2, 3, 7, 11])
    (part,) = take(mixed, 1, rows=lambda size: named)
    for key in ("x", "text", "text_mask", "loss_mask", "index"):
        np.testing.assert_array_equal(part[key], whole[key][named])
    assert part["size"] == whole["size"] == 16


def test_processes_hold_contiguous_slices_of_the_global_batch(mixed):
    whole = take(mixed, 3, start_step=5)
    parts = [take(mixed, 3, start_step=5, rows=share(p, 2)) for p in (0, 1)]
    for key in ("x", "text", "text_mask", "loss_mask", "index"):
        for step in range(3):
            joined = np.concatenate([parts[0][step][key], parts[1][step][key]])
            np.testing.assert_array_equal(joined, whole[step][key])


def test_clips_may_have_their_own_batch_size(mixed):
    steps = plan_of(mixed, 16, 7, clip_batch_size=4).batches_per_epoch
    found = []
    for process in (0, 1):
        part = take(mixed, steps, clip_batch_size=4, rows=share(process, 2))
        assert {b["x"].shape[:2] for b in part} == {(8, 1), (2, 4)}
        found += numbers(part)
    assert sorted(found) == list(range(mixed.records))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_no_fleet_divides_is_filled_up_and_no_record_lost(mixed, processes):
    steps = plan_of(mixed, 14, 7).batches_per_epoch
    found = []
    for process in range(processes):
        part = take(mixed, steps, batch_size=14, multiple=8, rows=share(process, processes))
        assert all(len(b["index"]) == 16 // processes for b in part)
        found += numbers(part)
    assert sorted(found) == list(range(mixed.records))
    (alone,) = take(mixed, 1, batch_size=14)
    (filled,) = take(mixed, 1, batch_size=14, multiple=8)
    np.testing.assert_array_equal(filled["x"][:14], alone["x"])
    assert filled["loss_mask"].tolist() == [1.0] * 14 + [0.0] * 2


def test_padding_is_masked_and_never_dropped(mixed):
    steps = plan_of(mixed, 100, 7).batches_per_epoch
    padded = 0
    for batch in take(mixed, steps, batch_size=100):
        np.testing.assert_array_equal(batch["loss_mask"] == 0, batch["index"] == -1)
        pad = batch["index"] == -1
        padded += pad.sum()
        assert abs(batch["x"][pad]).max(initial=0) < 0.01
        assert (batch["text"][pad] == mixed.null_text).all()
    assert padded == -341 % 100 + -128 % 100


def test_dropped_captions_are_the_null_states_at_their_rate():
    dataset = open_dataset("bundled:emoji", "holdout", height=8, width=8, caption_dropout=0.25)
    steps = plan_of(dataset, 50, 0).batches_per_epoch
    drops = collections.Counter()
    for batch in take(dataset, 8 * steps, batch_size=50, seed=0):
        for text, index in zip(batch["text"], batch["index"]):
            if index >= 0:
                dropped = (text == dataset.null_text).all()
                drops[bool(dropped)] += 1
                if not dropped:
                    np.testing.assert_array_equal(text, dataset.load(index)["text"])
    assert abs(drops[True] / sum(drops.values()) - 0.25) < 0.03


def test_samples_are_the_records(clips):
    frames, captions, text, mask = load_all(clips)
    assert frames.shape == (128, 4, 8, 8, 3) and frames.dtype == np.uint8
    assert len(captions) == 128 and captions == clips.captions
    batch = take(clips, 1)[0]
    for i, index in enumerate(batch["index"]):
        np.testing.assert_array_equal(batch["x"][i], to_unit(frames[index]))
        np.testing.assert_array_equal(batch["text"][i], text[index])
        np.testing.assert_array_equal(batch["text_mask"][i], mask[index])


def test_four_frames_are_every_second_of_the_stored_eight():
    stored = open_dataset("bundled:emoji", "holdout", frames=(8,))
    thinned = open_dataset("bundled:emoji", "holdout", frames=(4,))
    strided = open_dataset("bundled:emoji", "holdout", frames=(2,), frame_stride=4)
    eight = stored.load(3)["frames"]
    np.testing.assert_array_equal(thinned.load(3)["frames"], eight[::2])
    np.testing.assert_array_equal(strided.load(3)["frames"], eight[::4])
    assert stored.shapes[0].height == 64


def test_resizing_is_an_average_not_a_pick():
    whole = open_dataset("bundled:emoji", "holdout").load(40)["frames"][0].astype(float)
    small = open_dataset("bundled:emoji", "holdout", height=8, width=8).load(40)["frames"][0]
    boxes = whole.reshape(8, 8, 8, 8, 3).mean((1, 3))
    assert np.abs(boxes - small).mean() < 12
    assert np.abs(whole[4::8, 4::8] - small).mean() > np.abs(boxes - small).mean()


def test_to_unit_ends():
    np.testing.assert_allclose(to_unit(np.array([0, 255], np.uint8)), [-1, 1], atol=1e-6)


def test_a_damaged_record_is_named(tmp_path, monkeypatch):
    """A flipped bit, which the shard's own checksum shows; a picture that is none; no header."""
    folder = tmp_path / "data"
    shutil.copytree(bundled.resolve("bundled:emoji"), folder)
    shard = folder / "holdout-001f-64x64-00000.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    dataset = open_dataset(str(folder), "holdout", height=8, width=8)
    with pytest.raises(UserError, match=r"record \d+ is damaged .*hash mismatch.*; copy the data"):
        load_all(dataset)

    whole = dataset.record(0)
    monkeypatch.setattr(dataset, "record", lambda index: dataclasses.replace(
        whole, picture=whole.picture[:40]))
    with pytest.raises(UserError, match="record 340 is damaged"):
        dataset.load(340)
    monkeypatch.undo()
    monkeypatch.setattr(records, "unpack", lambda data: records.Record(frames="1"))
    with pytest.raises(UserError, match="record 340 is damaged"):
        dataset.load(340)


def test_a_disk_that_fails_while_a_record_is_read_stays_that(monkeypatch):
    dataset = open_dataset("bundled:emoji", "holdout", height=8, width=8)

    class Disk:
        def __getitem__(self, index):
            raise RuntimeError("Failed to read: Stale file handle, reading data")

    monkeypatch.setattr(dataset, "_reader", Disk())
    with pytest.raises(RuntimeError, match="Stale"):
        dataset.load(0)


def test_long_captions_are_cut_and_it_is_told(caplog):
    dataset = open_dataset("bundled:emoji", "holdout", height=8, width=8, max_text_tokens=3)
    with caplog.at_level("WARNING", "apt_jax"):
        load_all(dataset)
    assert len(caplog.records) == 1 and "max_text_tokens" in caplog.text


@pytest.mark.parametrize("options, words", [
    ({"path": "bundled:emojis"}, "emoji"),
    ({"path": "/nowhere"}, "apt-jax prepare"),
    ({"split": "test"}, "train, holdout"),
    ({"frames": (16,)}, "stored lengths: 1, 8"),
    ({"frames": (4,), "frame_stride": 3}, "frame_stride 3"),
    ({"frames": ()}, "start at 1"),
    ({"height": 8, "width": 0}, "both"),
    ({"caption_dropout": 1.5}, "caption_dropout"),
])
def test_wishes_that_cannot_be_met(options, words):
    with pytest.raises(UserError, match=words):
        open_dataset(**{"path": "bundled:emoji", **options})
