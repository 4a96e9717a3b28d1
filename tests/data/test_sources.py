"""Finding captioned files: tables, text files, groups, and what is refused."""

import errno
import os

import pytest
import tiny_media as tiny

from apt_jax.data import metadata, sources
from apt_jax.errors import UserError


def find(root):
    items, skipped = sources.find_items(root, root / "out")
    return {i.name: (i.caption, i.group) for i in items}, {s.name: s.reason for s in skipped}


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_jsonl_text_files_and_groups(tmp_path):
    touch(tmp_path, "a.png", "sub/b.JPG", "sub/c.mp4", "d.webp", "notes.pdf", "out/e.png", ".f.png")
    tiny.write_table(tmp_path, [("a.png", "an  apple\n"), ("sub/b.JPG", "a bee", "insects")])
    (tmp_path / "sub/c.txt").write_text("a cat\n")
    items, skipped = find(tmp_path)
    assert items == {"a.png": ("an apple", "a"), "sub/b.JPG": ("a bee", "insects"),
                     "sub/c.mp4": ("a cat", "c")}
    assert list(skipped) == ["d.webp"] and "no caption" in skipped["d.webp"]


def test_csv(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"red, round"\nb.png,\n')
    items, _ = find(tmp_path)
    assert items == {"a.png": ("red, round", "a"), "b.png": ("", "b")}


def test_missing_and_unknown_files_are_listed(tmp_path):
    touch(tmp_path, "a.png", "b.pdf")
    tiny.write_table(tmp_path, [("a.png", "x"), ("b.pdf", "x"), ("c.png", "x")])
    _, skipped = find(tmp_path)
    assert skipped["c.png"] == "no such file" and "not one of" in skipped["b.pdf"]


def test_pictures_of_formats_that_are_not_read_are_listed(tmp_path):
    touch(tmp_path, "a.bmp", "b.TIFF", "c.avi", "notes.pdf")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a picture")
    with pytest.raises(UserError) as caught:  # what to do about it, not captions that are there
        find(tmp_path)
    assert "of 3 left out: a.bmp: not one of .png" in str(caught.value)
    assert "give png, jpg, jpeg, webp, gif, mp4, webm, mov, mkv with" in str(caught.value)
    touch(tmp_path, "d.png")
    (tmp_path / "d.txt").write_text("x")
    items, skipped = find(tmp_path)
    assert list(items) == ["d.png"] and set(skipped) == {"a.bmp", "b.TIFF", "c.avi"}


@pytest.mark.parametrize("name", [
    "../a.png", "/etc/a.png", "x/../../a.png", "C:\\a.png", ".", "a\0b",
])
def test_names_out_of_the_folder_are_refused(tmp_path, name):
    touch(tmp_path, "a.png")
    tiny.write_table(tmp_path, [(name, "x")])
    with pytest.raises(UserError, match="out of the folder"):
        find(tmp_path)


def test_links_out_of_the_folder_are_left_out(tmp_path):
    root = tmp_path / "root"
    touch(root, "a.png")
    touch(tmp_path, "secret.png")
    (root / "b.png").symlink_to(tmp_path / "secret.png")
    tiny.write_table(root, [("a.png", "x"), ("b.png", "x")])
    items, skipped = find(root)
    assert list(items) == ["a.png"] and "link" in skipped["b.png"]


GOOD = b'{"file_name": "a.png", "text": "x"}\n'


@pytest.mark.parametrize("name, data, words", [
    ("jsonl", b"{", "line 1"), ("jsonl", b"[1]", "line 1: is not a JSON object"),
    ("jsonl", b'{"file_name": "a.png"}', "line 1: needs the columns file_name and text"),
    ("jsonl", GOOD * 2, "line 2: .* is listed twice"),
    ("jsonl", GOOD + b"17\n", "line 2: is not a JSON object"),
    ("jsonl", GOOD + b"[" * 100_000, "line 2: is not a JSON object"),
    ("jsonl", GOOD + b'{"file_name": "b.png", "text": "caf\xe9"}', "line 2: is not UTF-8"),
    ("jsonl", GOOD + b'{"file_name": "b.png", "text": "\\ud83d"}', "line 2: holds half a char"),
    ("jsonl", GOOD + b'{"file_name": "b.png", "text": "\0"}', "line 2: holds a NUL"),
    ("jsonl", GOOD.decode().encode("utf-16"), "line 1: is not UTF-8"),
    ("csv", b"file_name,text\na.png,x\nb.png,caf\xe9\n", "line 3: is not UTF-8"),
    ("csv", b"file_name,text\na.png,x\nb.png,\0\n", "line 3: holds a NUL"),
    ("csv", b'file_name,text\na.png,"x\ny"\n\nb.png,"' + b"y\n" * 70_000,
     r"line 5: field larger than field limit .131072."),
    ("csv", b"file_name,text\na.png\n", "line 2: needs the columns file_name and text"),
    ("csv", b"name,caption\na.png,x\n", "line 2: needs the columns file_name and text"),
])
def test_broken_tables_name_the_line(tmp_path, name, data, words):
    touch(tmp_path, "a.png")
    (tmp_path / f"metadata.{name}").write_bytes(data)
    with pytest.raises(UserError, match=rf"metadata.{name} {words}"):
        find(tmp_path)


@pytest.mark.parametrize("name, data", [
    ("jsonl", b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n\r\n")),
    ("csv", b"\xef\xbb\xbffile_name,text,more\r\na.png,x\r\n\r\n"),
    ("csv", b"file_name,text\ra.png,x\r"),
])
def test_tables_of_other_systems_are_read(tmp_path, name, data):
    touch(tmp_path, "a.png")
    (tmp_path / f"metadata.{name}").write_bytes(data)
    assert find(tmp_path)[0] == {"a.png": ("x", "a")}


def test_a_table_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "metadata.csv")
    monkeypatch.setattr(metadata, "open", failing(errno.EIO), raising=False)
    with pytest.raises(UserError, match="metadata.csv cannot be read .*check the disk"):
        find(tmp_path)


def failing(code):
    def work(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))
    return work


def test_captions_of_windows_and_captions_that_are_not_text(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfan apple\r\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").mkdir()
    items, skipped = find(tmp_path)
    assert items == {"a.png": ("an apple", "a")}
    assert "not UTF-8" in skipped["b.png"] and "no .txt beside it" in skipped["c.png"]


@pytest.mark.parametrize("code, words", [(errno.EACCES, None), (errno.EIO, "a.txt cannot be read")])
def test_captions_that_cannot_be_read(tmp_path, monkeypatch, code, words):
    touch(tmp_path, "a.png", "b.png")
    tiny.write_table(tmp_path, [("b.png", "x")])
    monkeypatch.setattr(sources, "open", failing(code), raising=False)
    if words:  # what passes must not decide what the data set is made of
        with pytest.raises(UserError, match=words):
            find(tmp_path)
    else:
        assert "cannot be read (Permission denied)" in find(tmp_path)[1]["a.png"]


def test_strange_names(tmp_path):
    strange = ["a b.png", "\u00e4\u4e2d.png", "new\nline.png", "'; rm -rf.png", "a.b.c.png",
               "%s{0}.png", "\U0001f600.png"]
    touch(tmp_path, *strange, "sub/\u00e4/x.png")
    touch(tmp_path, os.fsdecode(b"latin\xe9.png"), os.fsdecode(b"latin\xe9.tar"))
    tiny.write_table(tmp_path, [(name, "x") for name in (*strange, "sub/\u00e4/x.png", "n" * 300)])
    items, skipped = find(tmp_path)
    assert set(items) == {*strange, "sub/\u00e4/x.png"}
    assert skipped.pop("n" * 300) == "cannot be read: File name too long"
    assert skipped == dict.fromkeys(("latin\\udce9.png", "latin\\udce9.tar"),
                                    "its name is not UTF-8; rename it")


def test_links_and_what_is_no_file(tmp_path):
    touch(tmp_path, "a.png", "sub/b.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("nowhere", tmp_path / "broken.png")
    os.symlink(".", tmp_path / "self")
    os.symlink("loop", tmp_path / "loop")
    os.symlink("a.png", tmp_path / "link.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.png").mkdir()
    names = ["a.png", "sub/b.png", "loop.png", "broken.png", "link.png", "pipe.mp4", "folder.png",
             "a.png/x.png"]
    tiny.write_table(tmp_path, [(name, "x") for name in names])
    items, skipped = find(tmp_path)
    assert set(items) == {"a.png", "sub/b.png", "link.png"}
    assert "Too many levels" in skipped["loop.png"] and "link to a folder" in skipped["self"]
    assert {skipped[n] for n in ("broken.png", "a.png/x.png")} == {"no such file"}
    assert {skipped[n] for n in ("pipe.mp4", "folder.png")} == {"is no file"}
    assert sources.find_items(tmp_path, tmp_path / "loop")[0]  # an output that is a loop


@pytest.mark.parametrize("code, words", [(errno.EACCES, None), (errno.EIO, "sub cannot be read")])
def test_folders_that_cannot_be_searched(tmp_path, monkeypatch, code, words):
    touch(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "a.txt").write_text("x")
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (
        failing(code) if str(path).endswith("sub") else real)(path))
    if words:
        with pytest.raises(UserError, match=words):
            find(tmp_path)
    else:
        items, skipped = find(tmp_path)
        assert list(items) == ["a.png"] and "Permission denied" in skipped["sub"]


def test_nothing_to_do(tmp_path):
    with pytest.raises(UserError, match="metadata.jsonl"):
        find(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        find(tmp_path / "missing")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="keep one"):
        find(tmp_path)
