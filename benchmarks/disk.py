"""What `dd` reads and copies, and which files lie in the page cache."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PIECE = 4 << 20


def files_of(path: Path) -> list[Path]:
    """A file, or all files below a folder, in order."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def num_bytes(path: Path) -> int:
    """Of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def drop(path: Path) -> None:
    """Put files out of the page cache; it only lets go of what is on the disk."""
    os.sync()
    for file in files_of(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    """Put files into the page cache."""
    for file in files_of(path):
        with file.open("rb", buffering=0) as opened:
            while opened.read(_PIECE):
                pass


def flush(path: Path) -> None:
    """Wait until files are on the disk, as `dd conv=fsync` does."""
    for file in files_of(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def read_speed(path: Path, *, direct: bool) -> float:
    """Bytes/s of `dd bs=4M` over a file or the files of a folder, one after the other."""
    script = f'for file; do dd if="$file" of=/dev/null bs=4M {"iflag=direct" if direct else ""} || exit 1; done'
    return num_bytes(path) / _seconds(["sh", "-c", script, "sh", *map(str, files_of(path))])


def copy_speed(source: Path, destination: Path) -> float:
    """Bytes/s of `dd bs=4M conv=fsync`; the copy is removed again."""
    seconds = _seconds(["dd", f"if={source}", f"of={destination}", "bs=4M", "conv=fsync"])
    destination.unlink()
    return num_bytes(source) / seconds


def fresh_memory_speed(num_bytes: int) -> float:
    """Bytes/s of the first write to memory that a new process was given: what bounds a load from a faster disk."""
    code = "import sys, time, numpy as np; s = time.perf_counter(); np.empty(int(sys.argv[1]), np.uint8)[::4096] = 1; "
    command = [sys.executable, "-c", code + "print(time.perf_counter() - s)", str(num_bytes)]
    return num_bytes / float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _seconds(command: Sequence[str]) -> float:
    started_s = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    elapsed_s = time.perf_counter() - started_s
    if run.returncode:
        raise SystemExit(f"dd failed: {run.stderr.strip()[-300:]}. Is --folder on a disk that knows direct I/O?")
    return elapsed_s
