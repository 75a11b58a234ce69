"""Files in memory as one array, one behind the other, without a copy: the page cache's own pages.

What is mapped costs neither time to copy nor memory of its own, and a second process shares it; fresh memory for as
much costs more time than reading it. Linux alone puts one mapping behind another at a place of ours, of whole pages.
"""

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Linux's, which Python's mmap does not all name.
_PROT_NONE, _MAP_FIXED, _MAP_POPULATE, _MAP_NORESERVE = 0, 0x10, 0x8000, 0x4000
_FAILED = ctypes.c_void_p(-1).value


def can_map(num_bytes: int) -> bool:
    """Whether files of so many wanted bytes each can be mapped one behind the other."""
    return sys.platform == "linux" and num_bytes > 0 and num_bytes % mmap.PAGESIZE == 0


def map_files(files: Sequence[Path], num_bytes: int) -> np.ndarray:
    """The first `num_bytes` of every file, uint8 [files x num_bytes], read-only; see `can_map`.

    A file that is made shorter while it is mapped ends the process that reads it; replacing or removing one does not.

    Raises:
      OSError: a file cannot be opened or mapped.
    """
    total = len(files) * num_bytes
    place = _map(None, total, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    room: Any = (ctypes.c_uint8 * total).from_address(place)
    weakref.finalize(room, _libc().munmap, ctypes.c_void_p(place), ctypes.c_size_t(total)).atexit = False
    for number, file in enumerate(files):
        fd = os.open(file, os.O_RDONLY)
        try:
            flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_POPULATE
            _map(place + number * num_bytes, num_bytes, mmap.PROT_READ, flags, fd)
        finally:
            os.close(fd)
    array = np.frombuffer(room, np.uint8)
    array.flags.writeable = False
    return array


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
    )  # fmt: skip
    return libc


def _map(place: int | None, num_bytes: int, protection: int, flags: int, fd: int) -> int:
    found: int | None = _libc().mmap(place, num_bytes, protection, flags, fd, 0)
    if found is None or found == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"{num_bytes:,} bytes cannot be mapped: {os.strerror(error)}")
    return found
