"""WebDataset tars and parquet files: what is found, read, and left out where they are damaged."""

import errno
import io
import json
import tarfile

import numpy as np
import pytest
import tiny_media as tiny
from PIL import Image

from apt_jax.data import cutting, decode, prepare, sources, tables, worker
from apt_jax.data.archives import list_tar
from apt_jax.data.pipeline import open_dataset
from apt_jax.errors import UserError

SETTINGS = prepare.Settings(sizes=((16, 16),), frames=(1, 4), holdout=0.0, max_tokens=8)


def png(number):
    file = io.BytesIO()
    Image.fromarray(tiny.picture(number)).save(file, "PNG")
    return file.getvalue()


def mp4(folder, frames=9):
    tiny.save_video(folder / "scratch.mp4", frames)
    data = (folder / "scratch.mp4").read_bytes()
    (folder / "scratch.mp4").unlink()
    return data


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def samples(folder):
    return [
        ("0000.mp4", mp4(folder)), ("0000.txt", b"the  first film\n"),
        ("0001.png", png(1)), ("0001.json", json.dumps({"caption": "one", "group": 7}).encode()),
        ("sub.d/0002.x.png", png(2)), ("sub.d/0002.txt", b"two"),
        ("0003.mp4", mp4(folder)), ("0003.txt", b"the last film"),
    ]


def find(root):
    items, skipped = sources.find_items(root, root / "out")
    return ({i.name: (i.caption, i.group) for i in items},
            {s.name: s.reason for s in skipped}, items)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_found_and_read(tmp_path, format):
    long = "deep/" * 30 + "0004.png"
    write_tar(tmp_path / "a.tar", samples(tmp_path) + (
        [] if format == tarfile.USTAR_FORMAT else
        [(long, png(4)), (long[:-3] + "txt", "vier \u00e4".encode())]), format=format)
    found, skipped, items = find(tmp_path)
    want = {"a.tar/0000.mp4": ("the first film", "0000"), "a.tar/0001.png": ("one", "7"),
            "a.tar/sub.d/0002.x.png": ("two", "0002"), "a.tar/0003.mp4": ("the last film", "0003")}
    if format != tarfile.USTAR_FORMAT:
        want[f"a.tar/{long}"] = ("vier \u00e4", "0004")
    assert found == want and not skipped
    by_name = {i.name: i for i in items}
    blob = sources.fetch(tmp_path, by_name["a.tar/0001.png"])
    np.testing.assert_array_equal(decode.read(blob, [0], 24, 24)[0], tiny.picture(1))
    assert decode.probe(sources.fetch(tmp_path, by_name["a.tar/0003.mp4"])).frames == 9
    alone, _, _ = find(tmp_path / "a.tar")
    assert alone == found


def test_samples_without_captions_or_media_are_listed(tmp_path):
    write_tar(tmp_path / "a.tar", [*samples(tmp_path), ("8.png", png(8)), ("9.txt", b"nine"),
                                   ("7.png", png(7)), ("7.json", b'{"title": "x"}'),
                                   ("6.png", png(6)), ("6.json", b"{"), ("notes.pdf", b"x"),
                                   ("0001.png", png(9))])
    found, skipped, items = find(tmp_path)
    assert len(found) == 4
    assert skipped.pop("a.tar/0001.png") == "is there twice: the first one is taken"
    first = next(i for i in items if i.name == "a.tar/0001.png")
    np.testing.assert_array_equal(
        decode.read(sources.fetch(tmp_path, first), [0], 24, 24)[0], tiny.picture(1))
    assert set(skipped) == {f"a.tar/{n}" for n in ("6.png", "7.png", "8.png", "9.txt")}


def test_a_corrupt_member_is_skipped_and_the_rest_goes_on(tmp_path):
    members = samples(tmp_path)
    members[0] = ("0000.mp4", b"\0" * 700 + members[0][1][700:])  # a video that does not decode
    source = tmp_path / "in"
    source.mkdir()
    write_tar(source / "a.tar", members)
    made = prepare.prepare(source, tmp_path / "out", SETTINGS, encoder=tiny.HashEncoder(),
                           progress=False)
    assert made.splits == {"train": 3}
    (left,) = [json.loads(s) for s in open(tmp_path / "out" / prepare.SKIPPED)]
    assert left["name"] == "a.tar/0000.mp4" and left["reason"]
    dataset = open_dataset(tmp_path / "out", frames=(1, 4))
    assert {dataset.record(i).source for i in range(3)} == {
        "a.tar/0001.png", "a.tar/sub.d/0002.x.png", "a.tar/0003.mp4"}


@pytest.mark.parametrize("damage", ["header", "pax header", "a length of zeros"])
def test_a_damaged_header_costs_only_its_own_member(tmp_path, damage):
    pax = damage == "pax header"
    members = samples(tmp_path)
    if pax:
        members[2] = ("\u00e4" * 60 + "/0001.png", members[2][1])
    write_tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)
    with tarfile.open(tmp_path / "a.tar") as archive:
        hit = archive.getmembers()[2]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    size = 512 if pax else hit.offset_data + 100 - hit.offset
    filler = b"\0" * size if damage == "a length of zeros" else b"\xa5" * size
    data[hit.offset : hit.offset + size] = filler
    (tmp_path / "a.tar").write_bytes(data)
    found, skipped, _ = find(tmp_path)
    assert {"a.tar/0000.mp4", "a.tar/sub.d/0002.x.png", "a.tar/0003.mp4"} <= set(found)
    if not pax:  # of the damaged sample only the caption is left
        assert set(found) == {"a.tar/0000.mp4", "a.tar/sub.d/0002.x.png", "a.tar/0003.mp4"}
        assert "no media of this key" in skipped["a.tar/0001.json"]
    assert any("damaged" in reason for reason in skipped.values())


def test_a_tar_cut_short_keeps_what_is_whole(tmp_path):
    write_tar(tmp_path / "a.tar", samples(tmp_path))
    with tarfile.open(tmp_path / "a.tar") as archive:
        last = archive.getmember("0003.mp4")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: last.offset_data + 10])
    found, skipped, _ = find(tmp_path)
    assert len(found) == 3 and "cut short" in skipped["a.tar/0003.mp4"]


def test_compressed_tars_are_listed(tmp_path):
    write_tar(tmp_path / "a.tar", samples(tmp_path))
    (tmp_path / "b.tar.gz").write_bytes(b"")
    (tmp_path / "c.gz").write_bytes(b"")
    found, skipped, _ = find(tmp_path)
    assert len(found) == 4 and skipped == {"b.tar.gz": "a compressed tar; decompress it"}
    with pytest.raises(UserError, match="b.tar.gz is a compressed tar; decompress it"):
        find(tmp_path / "b.tar.gz")


def test_something_else_with_the_name_of_a_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 1000)
    tiny.image_folder(tmp_path, 1)
    found, skipped, _ = find(tmp_path)
    assert list(found) == ["p000.png"] and "damaged" in skipped["a.tar/@0-13000"]
    (tmp_path / "b.tar").write_bytes(b"")
    assert list_tar(tmp_path / "b.tar") == ([], [])


# -- parquet


def write_parquet(path, columns, **options):
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table(columns), path, **options)


def test_parquet_with_bytes_and_with_structs(tmp_path):
    pytest.importorskip("pyarrow")
    film = mp4(tmp_path)
    write_parquet(tmp_path / "a.parquet", {
        "video": [film, None, b"rubbish", png(3)], "caption": ["a", "b", "c", None],
        "url": list("wxyz")}, row_group_size=1)
    write_parquet(tmp_path / "b.parquet", {
        "image": [{"bytes": png(i), "path": None} for i in range(5)],
        "text": [f"image {i}" for i in range(5)], "group": ["g", "", None, "g", "g"]},
        row_group_size=2)
    found, skipped, items = find(tmp_path)
    assert found["a.parquet/000000"] == ("a", "a/000000") and len(found) == 8
    assert found["b.parquet/000003"] == ("image 3", "g")
    assert found["b.parquet/000002"][1] == "b/000002"
    assert list(skipped) == ["a.parquet/000003"]
    by_name = {i.name: i for i in items}
    for i in range(5):
        blob = sources.fetch(tmp_path, by_name[f"b.parquet/{i:06d}"])
        np.testing.assert_array_equal(decode.read(blob, [0], 24, 24)[0], tiny.picture(i))
    made = prepare.prepare(tmp_path, tmp_path / "out", SETTINGS, encoder=tiny.HashEncoder(),
                           progress=False)
    assert made.splits == {"train": 6} and made.skipped == 3
    reasons = (tmp_path / "out" / prepare.SKIPPED).read_text()
    assert "no bytes in column" in reasons and "no known image or video format" in reasons


def test_a_parquet_files_footer_is_read_once_and_few_stay_open(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    opened = []

    class Counting(pyarrow.parquet.ParquetFile):
        def __init__(self, path, *args, **options):
            opened.append(path.name)
            super().__init__(path, *args, **options)

    for name in "abcdef":
        write_parquet(tmp_path / f"{name}.parquet", {
            "png": [png(i) for i in range(7)], "text": list("tuvwxyz")}, row_group_size=3)
    _, _, items = find(tmp_path)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Counting)
    monkeypatch.setattr(tables, "_reader", tables._Reader())
    for item in items:
        assert sources.fetch(tmp_path, item).data == png(item.place)
    assert opened == [f"{name}.parquet" for name in "abcdef"]
    assert len(tables._reader._files) == tables._OPEN < 6 and len(tables._reader._groups) == 2
    write_parquet(tmp_path / "f.parquet", {"png": [png(9)], "text": ["t"]})  # another file now
    assert sources.fetch(tmp_path, items[-7]).data == png(9)
    with pytest.raises(ValueError):  # it has one row; its file is opened anew the next time
        sources.fetch(tmp_path, items[-1])
    assert sources.fetch(tmp_path, items[-7]).data == png(9) and len(opened) == 8


def test_bytes_read_are_those_of_the_media(tmp_path):
    pytest.importorskip("pyarrow")
    source = tmp_path / "in"
    source.mkdir()
    pictures = [png(i) for i in range(4)]
    write_parquet(source / "a.parquet", {"png": pictures[:2], "text": ["x", "y"]})
    write_tar(source / "b.tar", [("0.png", pictures[2]), ("0.txt", b"x"), ("1.png", b""),
                                 ("1.txt", b"x")])
    (source / "c.png").write_bytes(pictures[3])
    (source / "c.txt").write_text("x")
    _, _, items = find(source)
    assert {i.name: i.size for i in items} == {
        "a.parquet/000000": (source / "a.parquet").stat().st_size,
        "a.parquet/000001": (source / "a.parquet").stat().st_size,
        "b.tar/0.png": len(pictures[2]), "b.tar/1.png": 0, "c.png": len(pictures[3])}
    made = worker.Worker(source, tmp_path, SETTINGS, tiny.HashEncoder())
    plans = [cutting.Plan(item, ("train", 1, 16, 16), (0,), 0.0) for item in items]
    stats = made.write(worker.Job("x.arrayrecord", ("train", 1, 16, 16), tuple(plans)))["stats"]
    made.close()
    assert stats["bytes_in"] == sum(map(len, pictures)) and stats["records"] == 4


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_an_archive_that_cannot_be_read_just_now_stops_the_run(tmp_path, monkeypatch, name):
    """Left out, it would be another data set; the next run would be refused."""
    pytest.importorskip("pyarrow")
    write_tar(tmp_path / "a.tar", samples(tmp_path))
    write_parquet(tmp_path / "a.parquet", {"png": [png(0)], "text": ["x"]})

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    if name == "a.tar":
        monkeypatch.setattr(tarfile.TarFile, "next", fail)
    else:
        import pyarrow.parquet

        monkeypatch.setattr(pyarrow.parquet, "ParquetFile", fail)
    with pytest.raises(UserError, match=f"{name} cannot be read .Input/output error"):
        find(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "_list", refuse_if(name, sources._list))
    found, skipped, _ = find(tmp_path)
    assert skipped == {name: "cannot be read: Permission denied"} and found


def refuse_if(name, real):
    def work(path):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)
    return work


def test_broken_and_foreign_parquet_files_are_listed(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "good.parquet", {"png": [png(0)], "text": ["x"]})
    data = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    write_parquet(tmp_path / "numbers.parquet", {"a": [1], "b": [2]})
    write_parquet(tmp_path / "two.parquet", {"u": [b"1"], "v": [b"2"], "text": ["x"]})
    found, skipped, _ = find(tmp_path)
    assert list(found) == ["good.parquet/000000"]
    assert set(skipped) == {"cut.parquet", "numbers.parquet", "two.parquet"}
    assert "there are u, v, text" in skipped["two.parquet"]


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"apt_jax\[data\]"):
        find(tmp_path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.webm", "a.mkv", "a.png", "a.jpg", "a.webp",
                                  "a.gif"])
def test_formats_are_told_from_their_bytes(tmp_path, name):
    path = tmp_path / name
    if path.suffix in decode.VIDEOS:
        tiny.save_video(path, 3)
    else:
        tiny.save_image(path)
    suffix = tables.suffix_of(path.read_bytes())
    assert suffix == path.suffix or (path.suffix, suffix) == (".webm", ".mkv")
    assert decode.probe(decode.Blob("a" + suffix, path.read_bytes())).height in (24, 32)
