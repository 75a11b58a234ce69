"""What the host still has, read from a made-up /proc and cgroup; and what is given back to it."""

import ctypes
import os
from pathlib import Path

import pytest

from millrace.runtime.host_memory import available_bytes, give_back

MIB = 2**20


def make_root(folder: Path, **files: str) -> Path:
    paths = {"meminfo": "proc/meminfo", **{name: f"sys/fs/cgroup/memory.{name}" for name in ("max", "current", "stat")}}
    for name, text in files.items():
        path = folder / paths[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MEMINFO = f"MemTotal: {900 * 1024} kB\nMemFree: {3 * 1024} kB\nMemAvailable: {500 * 1024} kB\n"


def test_the_page_cache_counts_as_available(tmp_path: Path) -> None:
    assert available_bytes(make_root(tmp_path, meminfo=MEMINFO)) == 500 * MIB


def test_a_container_without_a_limit_has_what_the_host_has(tmp_path: Path) -> None:
    assert available_bytes(make_root(tmp_path, meminfo=MEMINFO, max="max\n", current="5\n")) == 500 * MIB


def test_a_container_has_its_limit_less_what_it_holds_and_cannot_drop(tmp_path: Path) -> None:
    stat = f"anon 7\nfile {90 * MIB}\ninactive_file {50 * MIB}\n"
    root = make_root(tmp_path, meminfo=MEMINFO, max=f"{200 * MIB}\n", current=f"{120 * MIB}\n", stat=stat)
    assert available_bytes(root) == 130 * MIB


def test_a_container_past_its_limit_has_nothing(tmp_path: Path) -> None:
    assert available_bytes(make_root(tmp_path, meminfo=MEMINFO, max="100", current="101")) == 0


def test_a_host_that_tells_nothing_has_all_its_memory(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) > 0


def test_what_was_freed_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells so how much is resident")
    pieces = [bytearray(60_000) for _ in range(2_000)]  # small enough for the heap
    last = pieces[-1]  # above which nothing is free: the heap does not shrink by itself
    del pieces
    before = resident()
    give_back()
    assert resident() < before - 60_000_000
    assert len(last) == 60_000


def test_a_library_that_keeps_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back()
