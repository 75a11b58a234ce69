"""One way to show a measurement: a table on stdout, and the same numbers as JSON in benchmarks/results/."""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def report(name: str, rows: Sequence[Mapping[str, Any]], claims: Mapping[str, bool]) -> None:
    """Print `rows` under their keys and each claim with whether it holds, and write both with the machine's facts."""
    show(name, rows, claims)
    write(name, rows, claims)


def report_gpu(name: str, rows: Sequence[Mapping[str, Any]], claims: Mapping[str, bool]) -> None:
    """`report` where jax runs on a GPU; a try on a CPU is only shown."""
    (show if sys.modules["jax"].default_backend() == "cpu" else report)(name, rows, claims)


def write(name: str, rows: Sequence[Mapping[str, Any]], claims: Mapping[str, bool], device: str | None = None) -> None:
    """What `report` writes; `device` is what was measured where another process did it."""
    machine = describe_machine()
    if device is not None:
        machine["jax"] = f"jax {metadata.version('jax')} on {device}"
    RESULTS.mkdir(exist_ok=True)
    command = f"python benchmarks/{Path(sys.argv[0]).resolve().relative_to(RESULTS.parent)}"
    record = {"command": command, "machine": machine, "rows": list(rows), "claims": dict(claims)}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def show(name: str, rows: Sequence[Mapping[str, Any]], claims: Mapping[str, bool]) -> None:
    """Print them; rows may lack keys of the first."""
    print(f"{name} on {', '.join(describe_machine().values())}\n")
    texts = [list(rows[0]), *([_text(row.get(key, "-")) for key in rows[0]] for row in rows)]
    print(table(texts))
    print()
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equally many cells under each other, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def describe_machine() -> dict[str, str]:
    """What a number depends on."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": f"{_processor()}, {num_cores} cores",
        "python": f"Python {platform.python_version()}",
        "jax": f"jax {metadata.version('jax')} on {_device()}",
        "options": re.sub(r"=\S*/\S*", "=PATH", " ".join(sys.argv[1:])) or "default options",
    }


def _device() -> str:
    """The first device where the benchmark itself runs jax; one that times other processes must not start it."""
    if "jax" not in sys.modules:
        return "its default device"
    return str(sys.modules["jax"].devices()[0].device_kind)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _text(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
