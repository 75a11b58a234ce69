"""Where the GPU's time goes while a runtime works: kernels by name, from a trace of a second or two."""

import collections
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax


def profile(seconds: float) -> list[dict[str, Any]]:
    """Kernels that ran in the next `seconds`, those that took longest first, each with its share of the time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            time.sleep(seconds)
        (path,) = Path(folder).rglob("*.xplane.pb")
        return shares(_events(path), seconds)


def shares(events: Iterable[tuple[str, float]], seconds: float) -> list[dict[str, Any]]:
    """Rows of events (name, nanoseconds), without the numbers at the end of names, which tell like kernels apart."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for name, ns in events:
        times[re.sub(r"([._]\d+)+$", "", name)].append(ns)
    rows = [
        {"kernel": name, "calls": len(each), "us": sum(each) / len(each) / 1e3, "share": sum(each) / 1e9 / seconds}
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def _events(path: Path) -> Iterator[tuple[str, float]]:
    """Of the device's streams; lines that sum them up by program or scope are left out."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.duration_ns) for event in line.events)
