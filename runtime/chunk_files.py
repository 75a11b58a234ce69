"""The chunks of a local store, read from their files straight into the caller's buffer.

TensorStore writes these files, and reads them as it reads all other stores. Here it is passed by: its CRC32C was
several times slower than google-crc32c's, its copy from the page cache goes through a buffer, and its "direct"
mode (0.1.86) opens files without O_DIRECT. What is read is the format's own: a chunk's bytes, and their CRC32C.
"""

import errno
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ..sharding.specs import Region
from .safetensors_file import aligned_empty
from .store_format import ArrayEntry

_BLOCK_BYTES = 4096  # direct I/O: files, buffers and sizes in multiples of it
_CRC_BYTES = 4
_PIECE_BYTES = 1 << 20  # of a cached file: its CRC32C is taken while the processor's cache still holds it
_NUM_READERS = 4  # chunks on their way at once; from the page cache no more than processors: they copy, none waits


class ChunkFiles:
    """Reads regions of arrays, several chunks at a time; `direct` reads past the page cache."""

    def __init__(self, *, direct: bool) -> None:
        self._direct = direct
        num_readers = _NUM_READERS if direct else min(_NUM_READERS, os.cpu_count() or 1)
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="millrace-chunks")
        self._own = threading.local()  # a reader's room for one chunk: fresh memory is slower than a disk

    def start_read(self, folder: Path, entry: ArrayEntry, region: Region, out: np.ndarray) -> list["Future[None]"]:
        """Begin to fill `out` with a region of the array in `folder`; the futures raise OSError or ValueError."""
        pending = []
        for file, inside, to in _touched(entry, region):
            view: Any = (*to, ...)  # with the dots an array, even of a scalar
            pending.append(self._readers.submit(self._read, folder / file, entry, inside, out[view]))
        return pending

    def _read(self, file: Path, entry: ArrayEntry, inside: Region, target: np.ndarray) -> None:
        """Bring what lies `inside` of a chunk to its place."""
        if target.shape == entry.chunk_shape and target.flags.c_contiguous:
            read_chunk(file, target.reshape(-1).view(np.uint8), direct=self._direct)
            return
        room: np.ndarray | None = getattr(self._own, "room", None)
        if room is None or room.size < entry.chunk_bytes:
            room = self._own.room = aligned_empty(entry.chunk_bytes, _BLOCK_BYTES)
        whole = room[: entry.chunk_bytes]
        read_chunk(file, whole, direct=self._direct)
        target[...] = whole.view(entry.dtype).reshape(entry.chunk_shape)[inside]


def _touched(entry: ArrayEntry, region: Region) -> Iterator[tuple[str, Region, Region]]:
    """The files of the chunks that a region touches, what it wants of each, and where in the region that belongs."""
    axes = [list(_cuts(part, step)) for part, step in zip(region, entry.chunk_shape, strict=True)]
    for cell in itertools.product(*axes):
        indices, inside, to = zip(*cell, strict=True) if cell else ((), (), ())
        yield "/".join(("c", *map(str, indices))), inside, to


def _cuts(part: slice, step: int) -> Iterator[tuple[int, slice, slice]]:
    """Along one dimension: the index of each chunk, what is wanted of it, and where that belongs."""
    for index in range(part.start // step, -(-part.stop // step)):
        first = index * step
        start, stop = max(first, part.start), min(first + step, part.stop)
        yield index, slice(start - first, stop - first), slice(start - part.start, stop - part.start)


def read_chunk(file: Path, out: np.ndarray, *, direct: bool) -> None:
    """Fill `out`, contiguous bytes, with a chunk whose CRC32C follows it in the file.

    Raises:
      ValueError: the file is missing, cannot be opened or has another size, or its bytes are not those that were
        written; names it.
      OSError: the disk fails.
    """
    fd = _open(file, direct)
    try:
        expected, found = out.size + _CRC_BYTES, os.fstat(fd).st_size
        if found != expected:
            raise ValueError(f"{file} is damaged: it has {found:,} bytes, and should have {expected:,}")
        crc, stored = _read_direct(fd, out) if direct else _read_cached(fd, out)
    finally:
        os.close(fd)
    if crc != stored:
        raise ValueError(f"{file} is damaged: its CRC32C is {crc:#010x}, and should be {stored:#010x}")


def _open(file: Path, direct: bool) -> int:
    try:
        return os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except OSError as error:
        has_none = direct and error.errno == errno.EINVAL
        reason = "its file system has no direct I/O: use weights_io=cached" if has_none else error.strerror
        raise ValueError(f"{file}: {reason}") from error


def _read_cached(fd: int, out: np.ndarray) -> tuple[int, int]:
    """Fill `out`, piece by piece; the CRC32C of its bytes, and the one that follows them."""
    crc = 0
    for start in range(0, out.size, _PIECE_BYTES):
        piece = out[start : start + _PIECE_BYTES]
        _fill(fd, [piece], start)
        crc = google_crc32c.extend(crc, piece)
    tail = np.empty(_CRC_BYTES, np.uint8)
    _fill(fd, [tail], out.size)
    return crc, int.from_bytes(tail.tobytes(), "little")


def _read_direct(fd: int, out: np.ndarray) -> tuple[int, int]:
    """As `_read_cached`, in whole blocks: what does not fill one, all of an unaligned `out`, goes through a buffer."""
    is_aligned = out.ctypes.data % _BLOCK_BYTES == 0
    body = out[: out.size // _BLOCK_BYTES * _BLOCK_BYTES if is_aligned else 0]
    rest = out.size - body.size
    blocks = aligned_empty(-(-(rest + _CRC_BYTES) // _BLOCK_BYTES) * _BLOCK_BYTES, _BLOCK_BYTES)
    _fill(fd, [body, blocks], 0, out.size + _CRC_BYTES)
    out[body.size :] = blocks[:rest]
    return google_crc32c.value(out), int.from_bytes(blocks[rest : rest + _CRC_BYTES].tobytes(), "little")


def _fill(fd: int, buffers: list[np.ndarray], start: int, num_bytes: int | None = None) -> None:
    """Read into buffers that follow each other what the file has from `start` on, up to `num_bytes` of it.

    The system reads 2 GiB at once at most.
    """
    num_bytes = sum(buffer.size for buffer in buffers) if num_bytes is None else num_bytes
    done = 0
    while done < num_bytes:
        left, skip = [], done
        for buffer in buffers:
            left += [buffer[skip:]] if skip < buffer.size else []
            skip = max(skip - buffer.size, 0)
        num_read = os.preadv(fd, left, start + done)
        if num_read == 0:
            raise ValueError("the file is damaged: it became shorter while it was read")
        done += num_read
