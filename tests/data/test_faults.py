"""Disks that fail for a moment, notes and shards that were damaged, outputs that cannot be."""

import dataclasses
import errno
import json
import os

import pytest
import tiny_media as tiny

from apt_jax.data import decode, manifest, prepare, records, work
from apt_jax.errors import UserError

SETTINGS = prepare.Settings(name="tiny", sizes=((16, 16),), holdout=0.0, shard_records=3,
                            max_tokens=8)


def run(source, out, settings=SETTINGS, encoder=None, **options):
    return prepare.prepare(source, out, settings, encoder=encoder or tiny.HashEncoder(),
                           progress=False, **options)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    run(tiny.image_folder(root / "in", 9), root / "out")
    return root


def failing(real, name, error):
    def work(path, *rest):
        if path.name == name:
            raise error
        return real(path, *rest)
    return work


def test_the_name_of_a_skipped_file_may_hold_any_end_of_a_line(tmp_path):
    (tmp_path / work.WORK).mkdir()
    work.mark_again(tmp_path)
    lines = [json.dumps({"path": f"a{end}b.png", "passing": True}, ensure_ascii=False)
             for end in "\u2028\u2029\x85"]
    (tmp_path / prepare.SKIPPED).write_text("\n".join(lines) + "\n", "utf-8")
    assert work.tried_again(tmp_path) == 3


@pytest.mark.parametrize("where", ["probe", "read"])
@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied"),
    MemoryError()], ids=["EIO", "EACCES", "memory"])
def test_a_file_that_could_not_be_read_just_now_is_tried_again(
    prepared, tmp_path, monkeypatch, where, error
):
    out = tmp_path / "out"
    for _ in range(2):  # also when it fails again
        with monkeypatch.context() as patch:
            patch.setattr(decode, where, failing(getattr(decode, where), "p004.png", error))
            made = run(prepared / "in", out)
        assert made.splits == {"train": 8} and made.skipped == 1 and work.tried_again(out) == 1
        assert manifest.load(out, check_hashes=True) and "passing" in (
            out / prepare.SKIPPED).read_text()
    encoder = tiny.HashEncoder()
    assert run(prepared / "in", out, encoder=encoder).splits == {"train": 9}
    assert files(out) == files(prepared / "out") and work.tried_again(out) == 0
    assert not (out / prepare.WORK).exists()
    # The empty prompt, and shards: of a file that was not seen those behind it, else its own.
    assert encoder.calls == 1 + (2 if where == "probe" else 1)


@pytest.mark.parametrize("error, words", [
    (ModuleNotFoundError("No module named 'av'"), "No module named 'av'; install"),
    (UserError("reading parquet needs pyarrow; pip"), "needs pyarrow")])
def test_what_this_machine_lacks_is_no_fault_of_the_files(
    prepared, tmp_path, monkeypatch, error, words
):
    with monkeypatch.context() as patch:
        patch.setattr(decode, "probe", failing(decode.probe, "p004.png", error))
        with pytest.raises(UserError, match=words):
            run(prepared / "in", tmp_path / "out")
    assert run(prepared / "in", tmp_path / "out").splits == {"train": 9}


def test_a_failing_disk_that_a_decoder_takes_for_the_end_of_the_file(
    prepared, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(decode, "read", failing(decode.read, "p004.png", ValueError("too short")))
        patch.setattr(decode, "read_through", failing(
            decode.read_through, "p004.png", OSError(errno.EIO, "Input/output error")))
        run(prepared / "in", tmp_path / "out")
    assert "Input/output error" in (tmp_path / "out" / prepare.SKIPPED).read_text()
    assert run(prepared / "in", tmp_path / "out").splits == {"train": 9}


@pytest.mark.parametrize("error", [
    OSError("image file is truncated"), OSError(errno.EINVAL, "Invalid argument"), ValueError("x")])
def test_a_damaged_file_is_left_out_for_good(prepared, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(decode, "probe", failing(decode.probe, "p004.png", error))
        run(prepared / "in", tmp_path / "out")
    assert not (tmp_path / "out" / prepare.WORK).exists()
    assert run(prepared / "in", tmp_path / "out").splits == {"train": 8}
    assert "passing" not in (tmp_path / "out" / prepare.SKIPPED).read_text()


@pytest.fixture
def begun(prepared, tmp_path, monkeypatch):
    """A preparation that was interrupted with two of its three shards written."""
    real, count = records.write_shard, iter(range(9))

    def interrupting(*args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(records, "write_shard", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(prepared / "in", tmp_path / "out")
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("*.arrayrecord"))) == 2
    return tmp_path / "out"


def test_what_killed_runs_left_does_not_heap_up(prepared, begun, monkeypatch):
    """Two partial shards: one that another run may be writing, one of yesterday."""
    new, old = (begun / f"train-001f-16x16-00002.arrayrecord.{i:012d}.tmp" for i in range(2))
    new.write_bytes(b"x")
    old.write_bytes(b"x")
    (begun / "train-001f-99x99-00000.arrayrecord").write_bytes(b"x")  # of other settings
    os.utime(old, (0, 0))

    def stop(*_):
        assert new.exists() and not old.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        run(prepared / "in", begun)
    monkeypatch.undo()
    mine = begun / "mine.arrayrecord"
    mine.write_bytes(b"of somebody else")
    run(prepared / "in", begun)
    assert files(begun) == files(prepared / "out") | {mine.name: b"of somebody else"}
    run(prepared / "in", begun, restart=True)
    assert mine.exists()


@pytest.mark.parametrize("damage", [
    lambda out: (out / "manifest.json").write_text("{"),
    lambda out: first(out, "*.arrayrecord").write_bytes(b"x")], ids=["manifest", "shard"])
def test_a_finished_data_set_that_was_damaged_since(prepared, tmp_path, damage):
    out = tmp_path / "out"
    run(prepared / "in", out)
    damage(out)
    with pytest.raises(UserError, match="anew: add --restart"):
        run(prepared / "in", out)
    run(prepared / "in", out, restart=True)
    assert files(out) == files(prepared / "out")


def first(folder, pattern):
    return sorted(folder.glob(pattern))[0]


@pytest.mark.parametrize("pattern, damage, calls", [
    ("*.arrayrecord", lambda data: data[:-1000], 3),
    ("*.arrayrecord", lambda data: bytes(len(data)), 3),  # the right size, and nothing in it
    ("*.arrayrecord", None, 3),
    (".work/*.arrayrecord.json", lambda data: data[:40], 3),
    (".work/*.arrayrecord.json", lambda data: b"\xff\xfe", 3),
    (".work/*.arrayrecord.json", lambda data: b"[]", 3),
    (".work/*.arrayrecord.json", lambda data: data.replace(b'"key": "', b'"key": "0'), 3),
    (".work/scan.jsonl", lambda data: data[:200] + b"\xff\n" + data[201:], 2),
    (".work/scan.jsonl", lambda data: b'{"name": "p000.png"}\n[]\n' + data[200:], 2),
    (".work/settings.json", lambda data: data[:30], 2),
    (".work/settings.json", lambda data: b"\xff\xfe", 2),
])
def test_damaged_work_is_done_again(prepared, begun, pattern, damage, calls):
    path = first(begun, pattern)
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    encoder = tiny.HashEncoder()
    run(prepared / "in", begun, encoder=encoder)
    assert files(begun) == files(prepared / "out")
    assert encoder.calls == calls  # the empty prompt, the shard to come, and what was damaged


def test_settings_that_are_lost_do_not_let_other_work_through(prepared, begun, caplog):
    first(begun, ".work/settings.json").write_text("{")
    other = dataclasses.replace(SETTINGS, quality=50)
    encoder = tiny.HashEncoder()
    run(prepared / "in", begun, other, encoder=encoder)
    assert encoder.calls == 4 and "settings.json is damaged" in caplog.text
    run(prepared / "in", begun.with_name("fresh"), other)
    assert files(begun) == files(begun.with_name("fresh"))


def file_above(out):
    out.parent.write_text("x")


def folder_at(name):
    return lambda out: (out / name / "x").mkdir(parents=True)


@pytest.mark.parametrize("spoil, words", [
    (file_above, "a file lies where a folder"),
    (lambda out: (out.parent.mkdir(), out.write_text("x")), "a file lies where a folder"),
    (lambda out: (out.mkdir(parents=True), (out / ".work").write_text("x")),
     "a file lies where a folder"),
    (folder_at("skipped.jsonl"), "skipped.jsonl"),
    (folder_at("manifest.json"), "manifest.json"),
    (folder_at(".work/settings.json"), "settings.json"),
    (folder_at(".work/scan.jsonl"), "scan.jsonl"),
], ids=["above", "a file", "work", "skipped", "manifest", "settings", "scan"])
def test_an_output_that_cannot_be_is_one_line(prepared, tmp_path, spoil, words):
    out = tmp_path / "data" / "out"
    spoil(out)
    with pytest.raises(UserError, match=words) as caught:
        run(prepared / "in", out)
    assert "cannot be" in str(caught.value) and "[Errno" not in str(caught.value)
    assert not (out / manifest.FILE).is_file()


@pytest.mark.parametrize("name", ["skipped.jsonl", "manifest.json", "LICENCE", "settings.json"])
def test_a_disk_that_fills_up_beside_the_shards(prepared, tmp_path, monkeypatch, name):
    (tmp_path / "LICENCE").write_text("free")
    settings = dataclasses.replace(SETTINGS, notices=(str(tmp_path / "LICENCE"),))

    def full(real, place):
        def work(*paths):
            if os.path.basename(paths[place]) == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*paths)
        return work

    with monkeypatch.context() as patch:
        patch.setattr(work.os, "replace", full(os.replace, 1))
        patch.setattr(prepare.shutil, "copyfile", full(prepare.shutil.copyfile, 1))
        with pytest.raises(UserError, match="no space left while writing .*out; free some"):
            run(prepared / "in", tmp_path / "out", settings)
    assert not (tmp_path / "out" / manifest.FILE).exists()
    assert run(prepared / "in", tmp_path / "out", settings).notices == ("LICENCE",)
    run(prepared / "in", tmp_path / "again", dataclasses.replace(
        settings, notices=(str(tmp_path / "out" / "LICENCE"),)))
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_notice_that_lies_there_already(prepared, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "LICENCE").write_text("free")
    settings = dataclasses.replace(SETTINGS, notices=(str(tmp_path / "out" / "LICENCE"),))
    assert run(prepared / "in", tmp_path / "out", settings).notices == ("LICENCE",)
    assert (tmp_path / "out" / "LICENCE").read_text() == "free"
    for names in (("a/LICENCE", "b/LICENCE"), ("manifest.json",)):
        with pytest.raises(UserError, match="rename them"):
            run(prepared / "in", tmp_path / "o", dataclasses.replace(SETTINGS, notices=names))


def test_what_is_left_out_names_the_reason(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "probe", failing(
        decode.probe, "p004.png", OSError(errno.EIO, "Input/output error")))
    run(prepared / "in", tmp_path / "out")
    (entry,) = map(json.loads, open(tmp_path / "out" / prepare.SKIPPED))
    assert entry == {"name": "p004.png", "passing": True,
                     "reason": "OSError: Input/output error"}
