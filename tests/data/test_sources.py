"""Finding captioned files: tables, text files, groups, and what is refused."""

import pytest
import tiny_media as tiny

from apt_jax.data.sources import find_items
from apt_jax.errors import UserError


def find(root):
    items, skipped = find_items(root, root / "out")
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


@pytest.mark.parametrize("text, words", [
    ("{", "line 1"), ("[1]", "line 1"), ('{"file_name": "a.png"}', "file_name and text"),
    ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "line 2"),
])
def test_broken_tables_name_the_line(tmp_path, text, words):
    touch(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        find(tmp_path)


def test_nothing_to_do(tmp_path):
    with pytest.raises(UserError, match="metadata.jsonl"):
        find(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        find(tmp_path / "missing")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="keep one"):
        find(tmp_path)
