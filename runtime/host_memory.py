"""How much memory this process may still take on the host, and what it need not keep."""

import ctypes
import os
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """What the kernel could give without swapping, within the limit of the container (cgroup v2).

    Where neither is told (macOS), all the memory there is. `root` stands in for / in tests.
    """
    available = _field(root / "proc/meminfo", "MemAvailable:")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if available is None else 1024 * available
    group = root / "sys/fs/cgroup"
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or used is None:
        return free
    reclaimable = _field(group / "memory.stat", "inactive_file") or 0
    return max(min(free, limit - used + reclaimable), 0)


def give_back() -> None:
    """Return to the system what was freed: glibc would keep what loading and compiling took for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)


def _number(path: Path) -> int | None:
    """The number that a file holds; None if there is no such file or it says "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    """The number after a name at the start of a line."""
    lines = (line.split() for line in _text(path).splitlines())
    return next((int(words[1]) for words in lines if words and words[0] == name), None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
