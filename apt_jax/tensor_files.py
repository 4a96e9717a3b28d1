"""safetensors files, one or several, read and written tensor by tensor.

The library's own reader maps or loads whole files; checkpoints of 40 GB want less memory. Here a
tensor is read with `pread` when it is asked for and written as it comes, so memory holds one. A set
of files is strict: a cut file, a tensor in two files, an index that disagrees with its files are
errors that name what is wrong.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from apt_jax.errors import UserError, disk_errors

# safetensors' dtype names; the order is that of the format's documentation.
DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "U32": np.uint32,
    "F32": np.float32, "F64": np.float64, "I64": np.int64, "U64": np.uint64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}.items()}
NAMES: dict[np.dtype, str] = {kind: name for name, kind in DTYPES.items()}

SHARD_BYTES = 5 * 10**9  # diffusers' own limit of one file
_READ_BYTES = 2**30  # one system call moves less than 2 GiB
_MAX_HEADER = 100 * 2**20


class Tensor(NamedTuple):
    """Where a tensor lies: dtype, shape, and bytes [start, stop) of a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path | str) -> dict[str, Tensor]:
    """The tensors of one safetensors file; UserError when it is cut, torn or no such file."""
    path = Path(path)

    def damaged(why: str) -> UserError:
        return UserError(f"{path} is damaged or incomplete ({why}); copy or download it again")

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            lead = file.read(8)
            if len(lead) < 8:
                raise damaged(f"{size} bytes")
            (length,) = struct.unpack("<Q", lead)
            if length > min(_MAX_HEADER, size - 8):
                raise damaged("its header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except _Doubled as error:
        raise damaged(f"{error} is in it twice") from None
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON") from None
    base, tensors = 8 + length, {}
    if not isinstance(header, dict):
        raise damaged("its header is no table of tensors")
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise damaged("its metadata are no table of texts")
            continue
        if not _is_entry(entry):
            raise damaged(f"the header's entry of {name} is not understood")
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} has the dtype {entry['dtype']}, which is not known "
                            f"here; use a file with {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        needs = math.prod(shape) * dtype.itemsize
        if stop - start != needs:
            raise damaged(f"{name} has {stop - start} bytes, its shape asks for {needs}")
        if base + stop > size:
            raise damaged(f"{name} ends at byte {base + stop} of {size}")
        tensors[name] = Tensor(dtype, shape, path, base + start, base + stop)
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != base + end:
            raise damaged("its tensors overlap or leave a gap")
        end = tensor.stop - base
    if base + end != size:
        raise damaged(f"{size - base - end} bytes too many")
    return tensors


def _is_entry(entry: Any) -> bool:
    """Whether a header's entry has a name, counts and two offsets, whatever they say."""
    if not isinstance(entry, dict):
        return False
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    return (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)
            and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in shape + offsets))


class _Doubled(Exception):
    """A key that a JSON object holds twice; json alone would keep the last."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Doubled(key)
        found[key] = value
    return found


def read_metadata(path: Path | str) -> dict[str, str]:
    """The __metadata__ entry of a file; {} if it has none."""
    with Path(path).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__") or {}


class TensorSet:
    """The tensors of one or several files, by name; read when asked for.

    Use as a context manager: it keeps files open.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = [Path(file) for file in files]
        self.tensors: dict[str, Tensor] = {}
        self._open: dict[Path, int] = {}
        for file in self.files:
            for name, tensor in read_header(file).items():
                if name in self.tensors:
                    raise UserError(f"{name} is in {self.tensors[name].file.name} and again in "
                                    f"{file.name}; remove the file that does not belong there")
                self.tensors[name] = tensor

    def __enter__(self) -> TensorSet:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or its part [index] of the leading axis. A new array in the file's dtype."""
        tensor = self.tensors[name]
        shape, start, nbytes = tensor.shape, tensor.start, tensor.nbytes
        if index is not None:
            nbytes //= shape[0]
            shape, start = shape[1:], start + index * nbytes
        out = np.empty(nbytes, np.uint8)
        view, done = memoryview(out), 0
        with disk_errors(tensor.file, "read"):
            if tensor.file not in self._open:
                self._open[tensor.file] = os.open(tensor.file, os.O_RDONLY)
            while done < nbytes:
                count = os.preadv(self._open[tensor.file], [view[done:done + _READ_BYTES]],
                                  start + done)
                if count == 0:
                    raise UserError(f"{tensor.file} became shorter while {name} was read; copy it "
                                    "again")
                done += count
        return out.view(tensor.dtype).reshape(shape)


def find_files(folder: Path | str, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: STEM.safetensors, or those STEM.safetensors.index.json
    names. UserError when there are none or the index disagrees with the folder."""
    folder = Path(folder)
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        if index.is_file():
            raise UserError(f"{folder} has both {single.name} and {index.name}; remove one")
        return [single]
    if not index.is_file():
        raise UserError(f"{folder} has neither {single.name} nor {index.name}; give a folder with "
                        "safetensors weights")
    return sorted(folder / name for name in set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        ok = isinstance(names, dict) and names and all(isinstance(v, str) for v in names.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ok = False
    if not ok:
        raise UserError(f"{index} is not a safetensors index; copy it again")
    for file in set(names.values()):
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent} lacks {file}, which {index.name} names; copy or "
                            "download it")
    return names


def open_folder(folder: Path | str, stem: str = "model") -> TensorSet:
    """`find_files` opened, its index checked tensor by tensor against the files."""
    tensors = TensorSet(find_files(folder, stem))
    index = Path(folder) / f"{stem}.safetensors.index.json"
    if index.is_file():
        says = _weight_map(index)
        have = {name: tensor.file.name for name, tensor in tensors.tensors.items()}
        for name in sorted(set(says) | set(have)):
            if says.get(name) != have.get(name):
                raise UserError(f"{index}: {name} should be in {says.get(name, 'no file')} and is "
                                f"in {have.get(name, 'none')}; copy the folder again")
    return tensors


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _split(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    groups: list[list[Spec]] = []
    size = 0
    for spec in specs:
        if not groups or (size + spec.nbytes > limit and groups[-1]):
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    return groups


def write_files(folder: Path | str, stem: str, specs: Sequence[Spec],
                chunks: Iterable[np.ndarray], *, limit: int = SHARD_BYTES,
                metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Writes tensors one after the other; several files and an index above `limit` bytes.

    Args:
      folder: exists; nothing there has these names.
      specs: what will come, in order.
      chunks: the data: for each spec one array, or several whose bytes join to it (C order).
      limit: bytes of tensors in one file; a larger tensor gets a file of its own.

    Returns:
      The files with tensors.

    Raises:
      UserError on a full disk; ValueError when the chunks do not make up the specs.
    """
    folder = Path(folder)
    groups = _split(specs, limit)
    names = ([f"{stem}.safetensors"] if len(groups) <= 1 else
             [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))])
    chunks = (chunk for chunk in chunks if chunk.nbytes)
    for name, group in zip(names, groups or [[]], strict=True):
        with disk_errors(folder / name), open(folder / name, "xb", buffering=0) as file:
            for data in _bytes(group, chunks, metadata):
                while len(data):
                    data = data[file.write(data):]
            os.fsync(file.fileno())
    if next(chunks, None) is not None:
        raise ValueError("more chunks than specs")
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)},
                 "weight_map": {spec.name: name for name, group in zip(names, groups, strict=True)
                                for spec in group}}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return [folder / name for name in names]


def _bytes(specs: Sequence[Spec], chunks: Iterator[np.ndarray],
           metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    """The content of one file: header, then as many chunks as its tensors need."""
    yield _header(specs, metadata)
    for spec in specs:
        left = spec.nbytes
        while left:
            chunk = next(chunks, None)
            if chunk is None or chunk.dtype != spec.dtype or chunk.nbytes > left:
                got = "none" if chunk is None else f"{chunk.nbytes} bytes of {chunk.dtype}"
                raise ValueError(f"{spec.name}: a chunk of {got}, {left} of {spec.dtype} to come")
            yield memoryview(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8))
            left -= chunk.nbytes


def _header(specs: Sequence[Spec], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for spec in specs:
        header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape),
                             "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8, as the format asks
    return struct.pack("<Q", len(text)) + text


def write_json(path: Path | str, value: Any) -> None:
    """A JSON file, whole or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def read_json(path: Path | str) -> Any:
    """A JSON file; UserError when it is missing or no JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path.parent} has no readable {path.name}; copy it from where the "
                        "weights came from") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it again") from None


def read_table(path: Path | str) -> dict[str, Any]:
    """A JSON file that holds an object; UserError when it is missing or anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no table but {type(found).__name__}; copy it again")
    return found
