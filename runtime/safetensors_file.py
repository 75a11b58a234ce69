"""One safetensors file: its header checked whole before any tensor is read, its tensors read by position.

Format: 8 bytes of little-endian header length, the header (a JSON object of tensors and an optional
`__metadata__`), then the tensors' bytes without gaps (github.com/huggingface/safetensors). The format demands
no alignment and neither do we: every tensor is copied into a fresh, aligned buffer.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .json_files import MAX_JSON_BYTES, parse_object

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
# A value is NaN or infinite exactly if all of these bits are set.
_NOT_FINITE_BITS: Mapping[np.dtype, int] = {
    DTYPES["F16"]: 0x7C00,
    DTYPES["BF16"]: 0x7F80,
    DTYPES["F32"]: 0x7F80_0000,
    DTYPES["F64"]: 0x7FF0_0000_0000_0000,
    DTYPES["F8_E4M3"]: 0x7F,
    DTYPES["F8_E5M2"]: 0x7C,
    DTYPES["F8_E8M0"]: 0xFF,
}
_ALIGNMENT = 64  # jax on the CPU takes such a buffer over without a copy
_READ_BYTES = 4 << 20  # one read
_CHECK_VALUES = 1 << 16  # looked at in one go for NaN: the temporary stays in the cache
_PARALLEL_BYTES = 32 << 20  # tensors from here on are read by several threads
_NUM_READERS = 4
_MAX_RANK = 8  # weights have five dimensions at most
_MAX_SIZE = 1 << 48


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies; `start` and `stop` are bytes from the file's beginning."""

    dtype: np.dtype  # one with fields is that of a block of several values along the last axis (GGUF)
    shape: tuple[int, ...]  # counts values
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, and in memory as read."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A file of tensors whose header was found sound: safetensors, or GGUF (`gguf_file`)."""

    path: Path
    tensors: Mapping[str, TensorEntry]

    def read(self, name: str) -> np.ndarray:
        """The tensor in a fresh buffer that nothing else refers to; blocks as [*lead, blocks], not looked into.

        Raises:
          CheckpointError: the file became shorter since it was opened, or the tensor holds NaN or infinity.
        """
        entry = self.tensors[name]
        buffer = aligned_empty(entry.num_bytes)
        starts = range(0, entry.num_bytes, _READ_BYTES)
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}). Check its permissions.") from error
        try:
            if entry.num_bytes < _PARALLEL_BYTES:
                for start in starts:
                    self._read_part(fd, name, buffer, start)
            else:
                with ThreadPoolExecutor(_NUM_READERS) as readers:
                    list(readers.map(lambda start: self._read_part(fd, name, buffer, start), starts))
        finally:
            os.close(fd)
        shape = entry.shape if entry.dtype.names is None else (*entry.shape[:-1], -1)
        return buffer.view(entry.dtype).reshape(shape)

    def _read_part(self, fd: int, name: str, buffer: np.ndarray, start: int) -> None:
        """Fills buffer[start : start + _READ_BYTES] and looks for values that are not finite."""
        entry = self.tensors[name]
        part = buffer[start : start + _READ_BYTES]
        done = 0
        while done < part.size:
            num_read = os.preadv(fd, [part[done:].data], entry.start + start + done)
            if num_read == 0:
                raise CheckpointError(f"{self.path}: ends inside {name!r}; it became shorter while it was being read.")
            done += num_read
        if entry.dtype.names is None:
            check_finite(part.view(entry.dtype), f"{self.path}: {name!r}")


def aligned_empty(num_bytes: int, alignment: int = _ALIGNMENT) -> np.ndarray:
    """Uninitialised bytes, [num_bytes] uint8, that start at a multiple of 64, or of another alignment."""
    raw = np.empty(num_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + num_bytes]


def check_finite(array: np.ndarray, what: str) -> None:
    """Raise CheckpointError if a floating-point array, contiguous, holds NaN or infinity; `what` names it."""
    mask = _NOT_FINITE_BITS.get(array.dtype)
    if mask is None or array.size == 0:
        return
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    wanted = bits.dtype.type(mask)
    for start in range(0, bits.size, _CHECK_VALUES):
        if np.bitwise_and(bits[start : start + _CHECK_VALUES], wanted).max() == wanted:
            raise CheckpointError(
                f"{what} should hold finite numbers only; it holds NaN or infinity. "
                "The checkpoint is damaged: fetch it again, or repair the weights and save them anew."
            )


def open_safetensors(path: Path) -> TensorFile:
    """Reads and checks the header.

    Raises:
      CheckpointError: anything in the header that is malformed or disagrees with the file.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + header_bytes > file_bytes or header_bytes > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path}: expected a safetensors file; it has {file_bytes} bytes and announces a header of "
                    f"{header_bytes} (at most {MAX_JSON_BYTES}, and inside the file). It is truncated or not "
                    "safetensors: fetch it again."
                )
            header = parse_object(file.read(header_bytes), f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Check its permissions.") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ should be an object of strings; got {metadata!r:.80}.")
    tensors = {name: _entry(f"{path}: {name!r}", value, 8 + header_bytes) for name, value in header.items()}
    _check_cover(path, tensors, 8 + header_bytes, file_bytes)
    return TensorFile(path, tensors)


def _entry(what: str, value: Any, data_start: int) -> TensorEntry:
    """One tensor of a header."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{what}: expected dtype, shape and data_offsets; got {value!r:.80}. Fetch the file again."
        )
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(
            f"{what}: dtypes read here are {', '.join(DTYPES)}; got {dtype_name!r:.80}. Save the tensor as one of them."
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{what}: shape and data_offsets should be lists of whole numbers from 0 on; got {shape!r:.80} and "
            f"{offsets!r:.80}. Fetch the file again."
        )
    if len(shape) > _MAX_RANK:
        raise CheckpointError(f"{what}: a tensor here has at most {_MAX_RANK} dimensions; got {len(shape)}.")
    dtype = DTYPES[dtype_name]
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{what}: {dtype_name} {shape} takes {expected} bytes; data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}. Fetch the file again."
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers that a file's size or a tensor's dimension can be."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < _MAX_SIZE for number in value)


def _check_cover(path: Path, tensors: Mapping[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors must cover the file's data once: no overlap, no gap, nothing outside."""
    end, before = data_start, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            fault = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(
                f"{path}: {name!r} should start at byte {end}; it starts at {entry.start} and {fault} {before}. "
                "Fetch the file again."
            )
        end, before = entry.stop, repr(name)
    if end != file_bytes:
        fault = "truncated" if end > file_bytes else "longer than its tensors"
        raise CheckpointError(
            f"{path}: its tensors end at byte {end}; the file has {file_bytes} bytes and is {fault}. Fetch it again."
        )
