"""Data sets of latents with a stand-in VAE: from media to batches, interrupted, misused."""

import dataclasses
import itertools
import json

import ml_dtypes
import numpy as np
import pytest
import tiny_media as tiny

from apt_jax.data import latent_records, manifest, prepare, records, resample
from apt_jax.data.pipeline import batches, load_all, open_dataset, plan_of
from apt_jax.data.quantise import store
from apt_jax.errors import UserError

SETTINGS = prepare.Settings(
    name="tiny", sizes=((32, 32), (32, 48)), image_sizes=((48, 48),), frames=(1, 5), fps=10.0,
    holdout=0.3, shard_records=3, max_tokens=8, clips=0, text_dtype="bfloat16",
    negative_prompt="ugly and blurred")


def run(source, out, settings=SETTINGS, codec=None, **options):
    return prepare.prepare(source, out, settings, encoder=tiny.HashEncoder(),
                           codec=codec or tiny.PoolCodec(), progress=False, **options)


def files(folder):
    """Everything but the report, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != prepare.REPORT}


def media_folder(root):
    root.mkdir()
    rows = [(f"film{i}.mp4", f"film number {i}") for i in range(6)]
    for i, (name, _) in enumerate(rows):
        tiny.save_video(root / name, 8 + 3 * i, rate=20 if i % 2 else 10)
    tiny.save_video(root / "slow.webm", 7, height=32, width=32, rate=5)
    for i in range(4):
        tiny.save_image(root / f"still{i}.png", i, 60, 60)
    whole = (root / "film0.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "rubbish.mkv").write_bytes(b"rubbish" * 30)
    names = ["slow.webm", "cut.mp4", "rubbish.mkv", *(f"still{i}.png" for i in range(4))]
    tiny.write_table(root, rows + [(n, f"about {n}") for n in names])
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    run(media_folder(root / "in"), root / "out")
    return root


def all_records(out, **options):
    made = manifest.load(out)
    for split in made.splits:
        frames = sorted({b.frames for b in made.buckets if b.split == split})
        dataset = open_dataset(out, split, frames=frames, **options)
        for i in range(dataset.records):
            yield split, dataset.record(i)


def test_buckets_say_what_the_latents_are(prepared):
    made = manifest.load(prepared / "out", check_hashes=True)
    assert made.kind == "latents" and made.text_dtype == "bfloat16"
    assert json.loads((prepared / "out" / "manifest.json").read_text())["version"] == 2
    shapes = {(b.frames, b.height, b.width, b.channels, b.pixels) for b in made.buckets}
    assert shapes == {(1, 6, 6, 16, (1, 48, 48)), (2, 4, 4, 16, (5, 32, 32)),
                      (2, 4, 6, 16, (5, 32, 48))}
    assert manifest.parse(json.loads(made.dumps())).dumps() == made.dumps()


def test_every_window_is_there_and_the_rest_is_listed(prepared):
    starts = {}
    for _, record in all_records(prepared / "out"):
        starts.setdefault(record.source, []).append(round(record.start, 3))
    # 8 and 14 frames at 10/s, 20 at 10/s; 11, 17 and 23 frames at 20/s are 5, 8 and 11 at 10/s
    windows = {n: len(s) for n, s in starts.items() if n.startswith("film")}
    assert windows == {f"film{i}.mp4": n for i, n in enumerate((1, 1, 2, 1, 4, 2))}
    assert starts["film5.mp4"] == [0.0, 0.6]
    assert len(starts["slow.webm"]) == 2  # 1.4 s: frames are repeated
    left = {s["name"]: s["reason"] for s in json.loads(
        (prepared / "out" / "report.json").read_text())["skipped"]}
    assert sorted(left) == ["cut.mp4", "rubbish.mkv"] and all(left.values())


def test_records_are_the_codecs_latents(prepared):
    codec, encoder = tiny.PoolCodec(), tiny.HashEncoder()
    for _, record in all_records(prepared / "out"):
        frames, height, width = record.values.shape[:3]
        rate = record.fps
        assert rate == (10.0 if frames > 1 else 0.0)
        pixels = resample.read_clip(prepared / "in" / record.source, record.start, rate,
                                    1 + 4 * (frames - 1), 8 * height, 8 * width)
        want = codec.encode(pixels[None])[0].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(record.values, want)
        text, mask = encoder.encode([record.caption], 8)
        np.testing.assert_array_equal(
            record.text(), text[0, mask[0]].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_windows_are_frames_at_the_right_times(prepared):
    """film4 has 20 frames at 10 a second, its frame i grey 20 i: four windows side by side."""
    found = sorted((r.start, r) for _, r in all_records(prepared / "out")
                   if r.source == "film4.mp4")
    grey = [[round((float(f.astype(np.float32).mean()) + 1) * 127.5 / 20) for f in r.values]
            for _, r in found]
    first = [round(start * 10) for start, _ in found]
    assert first == [0, 5, 10, 15]
    assert grey[:2] == [[0, 4], [5, 9]]  # beyond 12 the grey wraps around


def test_the_report_adds_up(prepared, capsys):
    value = json.loads((prepared / "out" / "report.json").read_text())
    made = manifest.load(prepared / "out")
    assert value["files"] == 13 and value["records"] == sum(made.splits.values())
    assert value["frames"] == sum(b.records * b.pixels[0] for b in made.buckets)
    size = sum(s.bytes for b in made.buckets for s in b.shards)
    assert value["gigabytes"]["written"] == pytest.approx(size / 1e9, abs=1e-6)
    assert value["this_run"]["frames_per_second"] > 0
    from apt_jax.data import report

    text = report.table(value)
    assert "frames/s" in text and "rubbish.mkv" in text and f"{value['records']} with" in text


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_float32_latents_and_lose_nothing(prepared, processes):
    dataset = open_dataset(prepared / "out", "train", frames=(1, 2), max_text_tokens=6,
                           caption_dropout=0.0)
    assert dataset.kind == "latents" and dataset.channels == 16
    steps = plan_of(dataset, 4, 3).batches_per_epoch
    found, padded = [], 0
    for process in range(processes):
        for batch in itertools.islice(batches(dataset, batch_size=4, seed=3,
                                              rows=tiny.share(process, processes)), steps):
            n = 4 // processes
            assert batch["x"].dtype == np.float32 and batch["x"].shape[::4] == (n, 16)
            for i, index in enumerate(batch["index"]):
                if index < 0:
                    padded += 1
                    assert batch["loss_mask"][i] == 0 and not batch["x"][i].any()
                    np.testing.assert_array_equal(batch["text"][i], dataset.null_text)
                    continue
                record = dataset.record(index)
                found.append(int(index))
                np.testing.assert_array_equal(batch["x"][i], record.values.astype(np.float32))
                np.testing.assert_array_equal(batch["text"][i][batch["text_mask"][i]],
                                              record.text()[:6])
    assert sorted(found) == list(range(dataset.records)) and padded


def test_resumed_batches_are_the_same(prepared):
    dataset = open_dataset(prepared / "out", "train", frames=(1, 2))
    whole = list(itertools.islice(batches(dataset, batch_size=4, seed=3), 9))
    again = list(itertools.islice(batches(dataset, batch_size=4, seed=3, start_step=5), 4))
    for left, right in zip(whole[5:], again):
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


def test_a_shorter_run_takes_the_first_latents_of_a_causal_clip(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    tiny.save_video(source / "a.mp4", 12, height=32, width=32)
    tiny.write_table(source, [("a.mp4", "a film")])
    run(source, tmp_path / "out", dataclasses.replace(SETTINGS, frames=(9,), holdout=0.0))
    short = open_dataset(tmp_path / "out", frames=(2,))
    np.testing.assert_array_equal(short.load(0)["frames"], short.record(0).values[:2])
    assert next(batches(short, batch_size=1, seed=0))["x"].shape == (1, 2, 4, 4, 16)


@pytest.mark.parametrize("stop", ["look", "decode", "encode", "shard"])
def test_interrupted_and_continued_ends_with_the_same_bytes(prepared, tmp_path, monkeypatch, stop):
    calls = itertools.count()

    def interrupting(real, after):
        def work(*args, **kwargs):
            if next(calls) >= after:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        return work

    codec = tiny.PoolCodec()
    with monkeypatch.context() as patch:
        if stop == "look":
            patch.setattr(prepare.sources, "fetch", interrupting(prepare.sources.fetch, 5))
        elif stop == "decode":
            patch.setattr(resample, "read_clip", interrupting(resample.read_clip, 6))
        elif stop == "encode":
            codec.encode = interrupting(codec.encode, 2)
        else:
            patch.setattr(records, "write_shard", interrupting(records.write_shard, 2))
        with pytest.raises(KeyboardInterrupt):
            run(prepared / "in", tmp_path / "out", codec=codec, threads=1)
    assert not (tmp_path / "out" / manifest.FILE).exists()
    run(prepared / "in", tmp_path / "out")
    assert files(tmp_path / "out") == files(prepared / "out")


def test_films_in_archives_give_the_latents_of_the_files(prepared, tmp_path):
    """Bytes of films in a column of a parquet file and in a tar, beside captions."""
    pa = pytest.importorskip("pyarrow")
    import io
    import tarfile

    import pyarrow.parquet  # noqa: F401 - makes pa.parquet

    names = ["film2.mp4", "slow.webm", "still0.png"]
    data = [(prepared / "in" / name).read_bytes() for name in names]
    pa.parquet.write_table(pa.table({"video": data, "caption": names}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for i, (name, content) in enumerate(zip(names, data)):
            for member, part in ((name, content), (f"{name.split('.')[0]}.txt", name.encode())):
                info = tarfile.TarInfo(f"{i}{member}")
                info.size = len(part)
                archive.addfile(info, io.BytesIO(part))
    want = {(r.source, r.start): r.values for _, r in all_records(prepared / "out")
            if r.source in names}
    for source in ("a.parquet", "b.tar"):
        run(tmp_path / source, tmp_path / f"out.{source}",
            dataclasses.replace(SETTINGS, holdout=0.0))
        found = {(r.caption, r.start): r.values
                 for _, r in all_records(tmp_path / f"out.{source}")}
        assert found.keys() == want.keys() and len(found) == 5
        for key, values in want.items():
            np.testing.assert_array_equal(found[key], values)


def test_another_vae_is_another_data_set(prepared, tmp_path):
    run(prepared / "in", tmp_path / "out")
    other = tiny.PoolCodec()
    other.name = "another"
    with pytest.raises(UserError, match="another data set"):
        run(prepared / "in", tmp_path / "out", codec=other)


def test_int8_text_halves_what_is_stored(prepared, tmp_path):
    run(prepared / "in", tmp_path / "out", dataclasses.replace(SETTINGS, text_dtype="int8"))
    exact = {(r.source, r.start): r for _, r in all_records(prepared / "out")}
    for _, record in all_records(tmp_path / "out"):
        want = exact[record.source, record.start]
        assert record.text_values.dtype == np.int8
        np.testing.assert_array_equal(record.values, want.values)
        assert np.abs(record.text() - want.text()).max() < 0.03


def test_latents_that_are_not_finite_are_left_out(tmp_path):
    class Broken(tiny.PoolCodec):
        def encode(self, frames):
            z = super().encode(frames)
            z[0, 0, 0, 0, 0] = np.nan
            return z

    source = tiny.image_folder(tmp_path / "in", 4, 48)
    made = run(source, tmp_path / "out", dataclasses.replace(
        SETTINGS, holdout=0.0, image_sizes=(), shard_records=4), codec=Broken(batch=2))
    assert made.splits == {"train": 2} and made.skipped == 2
    assert "not finite" in (tmp_path / "out" / prepare.SKIPPED).read_text()


@pytest.mark.parametrize("change, words", [
    ({"frames": (1, 48)}, "choose 45 or 49"),
    ({"sizes": ((480, 850),)}, "nearest is 848 x 480"),
    ({"image_sizes": ((100, 100),)}, "no multiple of 16"),
    ({"max_enlarge": 0.5}, "max_enlarge"),
    ({"text_dtype": "float32"}, "text_dtype"),
    ({"min_fps": -1.0}, "min_fps"),
])
def test_settings_are_checked(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path, tmp_path / "out", dataclasses.replace(SETTINGS, **change))


def test_settings_of_latents_are_refused_for_pixels(tmp_path):
    with pytest.raises(UserError, match="belongs to latents"):
        prepare.prepare(tmp_path, tmp_path / "out", SETTINGS, encoder=tiny.HashEncoder())


@pytest.mark.parametrize("change, words", [
    ({"min_fps": 8.0}, "5 frames a second"),
    ({"max_enlarge": 1.2, "sizes": ((64, 64),)}, "enlarged 2.00 times"),
])
def test_unfit_files_are_listed(prepared, tmp_path, change, words):
    run(prepared / "in", tmp_path / "out", dataclasses.replace(SETTINGS, **change))
    assert words in (tmp_path / "out" / prepare.SKIPPED).read_text()


@pytest.mark.parametrize("options, words", [
    ({"height": 8, "width": 8}, "6 x 6"),
    ({"frame_stride": 2}, "frame_stride"),
    ({"frames": (3,)}, "stored lengths: 1, 2"),
])
def test_wishes_that_cannot_be_met(prepared, options, words):
    with pytest.raises(UserError, match=words):
        open_dataset(**{"path": prepared / "out", "frames": (1, 2), **options})


def test_evaluation_wants_pixels(prepared):
    dataset = open_dataset(prepared / "out", frames=(1,), height=6, width=6)
    with pytest.raises(UserError, match="pixels"):
        load_all(dataset)


def record(text_dtype="bfloat16"):
    values, scales = store(np.random.default_rng(0).normal(size=(3, 5)), text_dtype)
    latents = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).astype(ml_dtypes.bfloat16)
    return latent_records.LatentRecord(24.0, 1.5, "naïve", "a.mp4", "a", values, scales, latents)


@pytest.mark.parametrize("text_dtype", ["int8", "bfloat16"])
def test_records_come_back_exactly(text_dtype):
    first = record(text_dtype)
    second = latent_records.unpack(latent_records.pack(first))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))
    assert second.values.dtype == ml_dtypes.bfloat16 and second.tokens == 3


@pytest.mark.parametrize("damage", [
    lambda d: d[:5], lambda d: d[:-1], lambda d: d + b"x", lambda d: b"XXXX" + d[4:],
    lambda d: d[:4] + b"\1" + d[5:], lambda d: d[:9] + b"!" + d[10:],
])
def test_damaged_records_are_value_errors(damage):
    with pytest.raises(ValueError):
        latent_records.unpack(damage(latent_records.pack(record())))


@pytest.mark.parametrize("change, words", [
    (lambda v: v["text"].pop("dtype"), "dtype"),
    (lambda v: v["text"].update(dtype="int4"), "dtype"),
    (lambda v: v["text"]["null"].update(scales="AAAA"), "scales null"),
    (lambda v: v["buckets"][0].pop("channels"), "channels"),
    (lambda v: v["buckets"][0].update(kind="pixels"), "kind"),
    (lambda v: v["buckets"][0].update(pixels=[1, 2]), "pixels"),
    (lambda v: v.update(version=1), "dtype"),
])
def test_faults_of_the_manifest_are_named(prepared, change, words):
    value = json.loads((prepared / "out" / "manifest.json").read_text())
    change(value)
    with pytest.raises(UserError, match=words):
        manifest.parse(value)


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(
    prepared, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    names = itertools.count()

    class Named:
        """Names of partial files that can be foreseen: the second one lies on a full disk."""

        @property
        def hex(self):
            return f"{next(names):012d}"

    first = sorted(p.name for p in (prepared / "out").glob("train-001f*"))[0]
    second = sorted(p.name for p in (prepared / "out").glob("train-005f-32x32*"))[0]
    for shard in (first, second):
        (out / f"{shard}.000000000001.tmp").symlink_to("/dev/full")
    monkeypatch.setattr(records.uuid, "uuid4", Named)
    with pytest.raises(UserError, match="no space left.*the same command continues") as caught:
        run(prepared / "in", out)
    assert "\n" not in str(caught.value) and not (out / manifest.FILE).exists()
    monkeypatch.undo()
    whole = {p.name for p in (prepared / "out").iterdir()}
    assert {p.name for p in out.glob("*.arrayrecord")} < whole
    run(prepared / "in", out)
    assert files(out) == files(prepared / "out")


def test_too_little_device_memory_is_one_line(prepared, tmp_path):
    class Hungry(tiny.PoolCodec):
        def encode(self, frames):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating 9 GB")

    with pytest.raises(UserError, match="lower encode_batch = 1"):
        run(prepared / "in", tmp_path / "out", codec=Hungry())
