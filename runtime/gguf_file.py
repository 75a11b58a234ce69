"""One GGUF file: its header checked whole before any tensor is read.

Format (ggml's docs/gguf.md, versions 2 and 3): magic, version, the numbers of tensors and of metadata, the metadata
(key, type, value), the tensors (name, dimensions from the innermost out, type, offset), and, aligned, their bytes. The
gguf package names the types; its reader is not used, for it trusts what it reads.
"""

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError
from ..models.families.gguf import BLOCK_TYPES
from .safetensors_file import DTYPES, TensorEntry, TensorFile

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 256 << 20  # far above that of any vocabulary
_MAX_RANK = 4
_MAX_SIZE = 1 << 48  # of a dimension, and of a tensor
_MAX_ALIGNMENT = 1 << 20
_MAX_NAME_LEN = 1 << 16
_PLAIN = {name: DTYPES[name] for name in ("F32", "F16", "BF16")}
# By the number of a metadata type: struct's code. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_KEY_BYTES, _LEAST_TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GgufFile(TensorFile):
    """A GGUF whose header was found sound."""

    metadata: Mapping[str, Any]
    types: Mapping[str, str]  # of each tensor, by name, as the gguf package names them


def open_gguf_file(path: Path) -> GgufFile:
    """Reads and checks the header.

    Raises:
      CheckpointError: anything in it that is malformed, absurd, unknown, or disagrees with the file.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            return _read_header(path, _Cursor(path, file, file_bytes), file_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Check its permissions.") from error


class _Cursor:
    """The header from its beginning on; no more is read ahead than was read already, or a megabyte at first."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path, self._file, self._file_bytes = path, file, file_bytes
        self._limit = min(file_bytes, _MAX_HEADER_BYTES)
        self._data = b""
        self.position = 0

    @property
    def room(self) -> int:
        """Bytes that the header may still have."""
        return self._limit - self.position

    def take(self, num_bytes: int, what: str) -> memoryview:
        """The next bytes; `what` names them in the error."""
        if num_bytes > self.room:
            kind = "ends" if self._limit == self._file_bytes else f"has a header of more than {self._limit} bytes"
            raise self.wrong(
                f"{what} takes {num_bytes} bytes at byte {self.position}; it {kind}. It is truncated or damaged"
            )
        end = self.position + num_bytes
        if end > len(self._data):
            self._data += self._file.read(max(end - len(self._data), len(self._data), 1 << 20))
            if end > len(self._data):
                raise self.wrong(f"{what} should end at byte {end}; it became shorter while it was read")
        taken = memoryview(self._data)[self.position : end]
        self.position = end
        return taken

    def number(self, code: str, what: str) -> Any:
        """One number of struct's code, little-endian."""
        form = _form(code)
        return form.unpack(self.take(form.size, what))[0]

    def string(self, what: str) -> str:
        """A length and so many bytes of UTF-8."""
        content = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} should be UTF-8; it starts {bytes(content[:20])!r}") from None

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings, one after the other: in one go where all of them were read already, as vocabularies are."""
        found: list[str] = []
        length = _form("Q")
        while len(found) < count:
            data, start = self._data, self.position + length.size
            if start > len(data) or (end := start + length.unpack_from(data, self.position)[0]) > len(data):
                found.append(self.string(what))  # reads more, or says what is wrong
                continue
            try:
                found.append(data[start:end].decode())
            except UnicodeDecodeError:
                found.append(self.string(what))
            self.position = end
        return found

    def wrong(self, what: str) -> CheckpointError:
        """The error that begins with the file's name."""
        return CheckpointError(f"{self.path}: {what}: fetch the file again.")


@functools.cache
def _form(code: str) -> struct.Struct:
    return struct.Struct(f"<{code}")


def _read_header(path: Path, cursor: _Cursor, file_bytes: int) -> GgufFile:
    magic = bytes(cursor.take(min(4, cursor.room), "the magic"))
    if magic != _MAGIC:
        raise cursor.wrong(f"expected a GGUF file, which begins with {_MAGIC!r}; it begins with {magic!r}")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        order = "is big-endian" if version and not version & 0xFFFF else f"has version {version}"
        raise CheckpointError(
            f"{path}: expected a little-endian GGUF of version {' or '.join(map(str, _VERSIONS))}; it {order}. "
            "Convert the model again with a current llama.cpp."
        )
    num_tensors, num_keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    if num_tensors * _LEAST_TENSOR_BYTES + num_keys * _LEAST_KEY_BYTES > cursor.room:
        raise cursor.wrong(f"it announces {num_tensors} tensors and {num_keys} keys; it has {file_bytes} bytes")
    metadata = _read_metadata(cursor, num_keys)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment should be a power of two from 8 to {_MAX_ALIGNMENT}; got {alignment!r}")
    rows = [_read_tensor(cursor) for _ in range(num_tensors)]
    if len({row.name for row in rows}) != len(rows):
        raise cursor.wrong("each tensor should be named once; one is named twice")
    start = -(-cursor.position // alignment) * alignment
    tensors = {row.name: row.entry(cursor, start, alignment) for row in rows}
    _check_cover(path, tensors, start, file_bytes)
    return GgufFile(path, tensors, metadata, {row.name: row.type for row in rows})


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = _read_name(cursor, "a key of the metadata")
        if key in metadata:
            raise cursor.wrong(f"each key should occur once; {key!r} occurs twice")
        metadata[key] = _read_value(cursor, cursor.number("I", f"the type of {key!r}"), key)
    return metadata


def _read_name(cursor: _Cursor, what: str) -> str:
    name = cursor.string(what)
    if not 0 < len(name) <= _MAX_NAME_LEN:
        raise cursor.wrong(f"{what} should have 1 to {_MAX_NAME_LEN} characters; it has {len(name)}")
    return name


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    """A string, a number (float32 as the shortest decimal that it can be), or a list of one of these."""
    if kind == _STRING:
        return cursor.string(f"the value of {key!r}")
    if kind in _SCALARS:
        return _shortest(cursor.number(_SCALARS[kind], f"the value of {key!r}"), kind)
    if kind != _ARRAY:
        raise cursor.wrong(f"the type of {key!r} should be 0 to 12; it is {kind}")
    kind, count = cursor.number("I", f"the type of {key!r}"), cursor.number("Q", f"the length of {key!r}")
    if kind == _STRING:
        if count * 8 > cursor.room:
            raise cursor.wrong(f"{key!r} announces {count} strings; there are {cursor.room} bytes left")
        return cursor.strings(count, f"a string of {key!r}")
    if kind not in _SCALARS:
        raise cursor.wrong(f"{key!r} should hold strings or numbers; it holds type {kind}")
    dtype = np.dtype(f"<{_SCALARS[kind]}")
    return np.frombuffer(cursor.take(count * dtype.itemsize, f"the array {key!r}"), dtype).tolist()


def _shortest(value: Any, kind: int) -> Any:
    return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value


@dataclasses.dataclass(frozen=True)
class _Row:
    """A tensor as the header has it."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int

    def entry(self, cursor: _Cursor, start: int, alignment: int) -> TensorEntry:
        """Where it lies; `start` is the byte at which offsets begin."""
        block = BLOCK_TYPES.get(self.type)
        dtype, num_inputs = (_PLAIN[self.type], 1) if block is None else (block.dtype, block.num_inputs)
        if self.shape[-1] % num_inputs:
            raise cursor.wrong(
                f"{self.name!r}: rows of {self.type} are multiples of {num_inputs}; got {self.shape[-1]}"
            )
        if self.offset % alignment or self.offset > _MAX_SIZE:
            raise cursor.wrong(f"{self.name!r}: its offset should be a multiple of {alignment}; it is {self.offset}")
        num_bytes = math.prod(self.shape) // num_inputs * dtype.itemsize
        return TensorEntry(dtype, self.shape, start + self.offset, start + self.offset + num_bytes)


def _read_tensor(cursor: _Cursor) -> _Row:
    name = _read_name(cursor, "a tensor's name")
    rank = cursor.number("I", f"the rank of {name!r}")
    if not 1 <= rank <= _MAX_RANK:
        raise cursor.wrong(f"{name!r} should have 1 to {_MAX_RANK} dimensions; it has {rank}")
    shape = tuple(cursor.number("Q", f"a dimension of {name!r}") for _ in range(rank))[::-1]
    if not all(0 < size < _MAX_SIZE for size in shape) or math.prod(shape) > _MAX_SIZE:
        raise cursor.wrong(
            f"{name!r} should have dimensions above 0 and {_MAX_SIZE} values at most; it has {list(shape)}"
        )
    number, offset = cursor.number("I", f"the type of {name!r}"), cursor.number("Q", f"the offset of {name!r}")
    return _Row(name, shape, _type_name(cursor, name, number), offset)


def _type_name(cursor: _Cursor, name: str, number: int) -> str:
    from gguf import GGMLQuantizationType

    known = (*_PLAIN, *BLOCK_TYPES)
    try:
        type_name = GGMLQuantizationType(number).name
    except ValueError:
        raise cursor.wrong(f"{name!r} has the unknown type {number}; types read are {', '.join(known)}") from None
    if type_name not in known:
        raise CheckpointError(
            f"{cursor.path}: {name!r} is {type_name}; types read are {', '.join(known)}. Take a file of those, such as "
            "Q4_K_M or Q8_0."
        )
    return str(type_name)


def _check_cover(path: Path, tensors: Mapping[str, TensorEntry], start: int, file_bytes: int) -> None:
    """No tensor overlaps another or reaches past the file's end."""
    end, before = start, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start < end:
            raise CheckpointError(
                f"{path}: {name!r} starts at byte {entry.start}, inside {before}: fetch the file again."
            )
        end, before = entry.stop, repr(name)
    if tensors and end > file_bytes:
        raise CheckpointError(
            f"{path}: {before} ends at byte {end}; the file has {file_bytes} and is truncated. Fetch it again."
        )
