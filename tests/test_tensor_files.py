"""Our safetensors reader and writer against the library's own, and every way a file is wrong."""

import errno
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

from apt_jax import tensor_files
from apt_jax.errors import UserError, disk_errors
from apt_jax.tensor_files import (
    Spec,
    TensorSet,
    open_folder,
    read_header,
    read_metadata,
    write_files,
)

RNG = np.random.default_rng(0)
ARRAYS = {
    "b/f": RNG.normal(size=(3, 4)).astype(np.float32),
    "a/i": np.arange(6, dtype=np.int64).reshape(2, 3),
    "c": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def specs(arrays):
    return [Spec(name, value.dtype, value.shape) for name, value in arrays.items()]


def test_reads_what_the_library_wrote(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors", {"a": "b"})
    with open_folder(tmp_path) as tensors:
        assert set(tensors.tensors) == set(ARRAYS)
        for name, value in ARRAYS.items():
            np.testing.assert_array_equal(tensors.read(name), value)
            assert tensors.read(name).dtype == value.dtype
        np.testing.assert_array_equal(tensors.read("b/f", 2), ARRAYS["b/f"][2])
    assert read_metadata(tmp_path / "model.safetensors") == {"a": "b"}


def test_the_library_reads_what_we_wrote(tmp_path):
    half = RNG.normal(size=(5, 2)).astype(ml_dtypes.bfloat16)
    arrays = {**ARRAYS, "half": half}
    files = write_files(tmp_path, "model", specs(arrays), arrays.values(), metadata={"x": "y"})
    path = tmp_path / "model.safetensors"
    found = {name: t for name, t in deserialize(path.read_bytes())}
    assert bytes(found["half"]["data"]) == half.tobytes() and found["half"]["dtype"] == "BF16"
    for name, value in ARRAYS.items():
        assert bytes(found[name]["data"]) == value.tobytes()
        assert found[name]["shape"] == list(value.shape)
    assert files == [path]


def test_chunks_join_and_large_sets_are_split(tmp_path):
    whole = RNG.normal(size=(4, 5)).astype(np.float32)
    arrays = {"a": whole, "b": whole + 1, "c": whole + 2}
    chunks = [row for value in arrays.values() for row in value]
    write_files(tmp_path, "model", specs(arrays), chunks, limit=170)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    assert set(load_file(tmp_path / names[0])) == {"a", "b"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 240
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1]}
    with open_folder(tmp_path) as tensors:
        for name, value in arrays.items():
            np.testing.assert_array_equal(tensors.read(name), value)


@pytest.mark.parametrize(("arrays", "chunks"), [
    ({"a": np.zeros(3, np.float32)}, [np.zeros(4, np.float32)]),
    ({"a": np.zeros(3, np.float32)}, [np.zeros(3, np.float16)]),
    ({"a": np.zeros(3, np.float32)}, [np.zeros(3, np.float32)] * 2),
    ({"a": np.zeros(3, np.float32)}, [np.zeros(2, np.float32)]),
])
def test_chunks_that_do_not_fit(tmp_path, arrays, chunks):
    with pytest.raises(ValueError):
        write_files(tmp_path, "model", specs(arrays), chunks)


# -- wrong files -----------------------------------------------------------------------------------


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: p.write_bytes(b"abc"), "3 bytes"),
    (lambda p: p.write_bytes(b""), "0 bytes"),
    (lambda p: p.write_bytes(struct.pack("<Q", 999) + b"{}"), "header is longer than the file"),
    (lambda p: raw(p, b"{not json"), "not JSON"),
    (lambda p: raw(p, b"[1]"), "no table"),
    (lambda p: raw(p, {"a": entry(0, 4)}, b"123"), r"a ends at byte \d+ of \d+"),
    (lambda p: raw(p, {"a": entry(0, 4)}, b"12345678"), "4 bytes too many"),
    (lambda p: raw(p, {"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlap or leave a gap"),
    (lambda p: raw(p, {"a": entry(0, 8)}, b"12345678"), "a has 8 bytes, its shape asks for 4"),
    (lambda p: raw(p, {"a": entry(0, 4, dtype="F7")}, b"1234"), "a has the dtype F7"),
    (lambda p: raw(p, {"a": entry(0, 4, dtype=["F32"])}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry(0, 4, dtype={})}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry(0, 4, (-1, -1))}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry(0, 4, (True,))}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry(0, 4, (1.0,))}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry(0, 4, "1")}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry(-4, 0)}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry("0", "4")}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"a": entry(4, 0)}, b"1234"), "a has -4 bytes"),
    (lambda p: raw(p, {"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, b"1234"),
     "of a is not understood"),
    (lambda p: raw(p, {"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "of a is not understood"),
    (lambda p: raw(p, {"__metadata__": [1]}), "no table of texts"),
    (lambda p: raw(p, {"__metadata__": {"a": {}}}), "no table of texts"),
    (lambda p: raw(p, b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "not JSON"),
    (lambda p: raw(p, {"a": 3}, b"1234"), "entry of a is not understood"),
    (lambda p: raw(p, b'{"a": 1, "a": 2}'), "a is in it twice"),
])
def test_a_damaged_file_is_one_line(tmp_path, make, says):
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(UserError, match=says) as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", range(0, 348, 29))
def test_a_file_cut_anywhere_is_noticed(tmp_path, size):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert len(data) > size
    (tmp_path / "x.safetensors").write_bytes(data[:size])
    with pytest.raises(UserError, match="damaged or incomplete"):
        read_header(tmp_path / "x.safetensors")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        open_folder(tmp_path)


def split_folder(folder):
    arrays = {"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}
    write_files(folder, "model", specs(arrays), arrays.values(), limit=16)
    return folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(("damage", "says"), [
    (lambda first, index: first.unlink(), "lacks model-00001-of-00002.safetensors"),
    (lambda first, index: index.write_text("{}"), "not a safetensors index"),
    (lambda first, index: index.write_text("{"), "not a safetensors index"),
    (lambda first, index: edit(index, lambda v: v["weight_map"].pop("a")
                               and v["weight_map"].update({"c": first.name})),
     "a should be in no file"),
    (lambda first, index: edit(index, lambda v: v["weight_map"].update({"c": first.name})),
     "c should be in model-00001-of-00002.safetensors and is in none"),
    (lambda first, index: save_file({"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)},
                                    first), "b is in .* and again in"),
    (lambda first, index: save_file({"a": np.zeros(4, np.float32)},
                                    first.with_name("model.safetensors")), "has both"),
])
def test_an_index_that_disagrees_with_its_files(tmp_path, damage, says):
    damage(*split_folder(tmp_path))
    with pytest.raises(UserError, match=says):
        open_folder(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(1000, np.float32)}, path)
    with TensorSet([path]) as tensors:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match="became shorter"):
            tensors.read("a")


@pytest.mark.parametrize(("code", "says"), [
    (errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"),
    (errno.EROFS, r"model\.safetensors cannot be written"), (errno.EIO, "check the disk"),
    (errno.ENOTDIR, "a file lies where a folder"), (errno.ENAMETOOLONG, "a shorter path"),
    (errno.EMFILE, "ulimit"),
])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, code, says):
    def refuse(_):
        raise OSError(code, "no")

    monkeypatch.setattr(tensor_files.os, "fsync", refuse)
    with pytest.raises(UserError, match=says):
        write_files(tmp_path, "model", specs(ARRAYS), ARRAYS.values())


def test_a_disk_that_fails_while_it_is_read(tmp_path, monkeypatch):
    save_file(ARRAYS, tmp_path / "x.safetensors")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensor_files.os, "preadv", fail)
    with TensorSet([tmp_path / "x.safetensors"]) as tensors:
        with pytest.raises(UserError, match=r"x\.safetensors cannot be read \(Input/output"):
            tensors.read("c")


def test_a_closed_pipe_is_no_fault_of_the_disk():
    """`apt-jax ... | head` prints inside such blocks; the command line ends it quietly."""
    with pytest.raises(BrokenPipeError), disk_errors("x"):
        raise BrokenPipeError(errno.EPIPE, "no")
