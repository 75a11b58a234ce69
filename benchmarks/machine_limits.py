"""What the machine can do at most, between the peers' turns: by machine_limits.cc, or numpy without a compiler."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from millrace.errors import NativeError
from millrace.pallas_kernels.native.compiler import find_compiler

READ_BYTES = 1 << 30  # several times the caches that a core has to itself
_SOURCE = Path(__file__).with_name("machine_limits.cc")


class MachineLimits:
    """Built once below `folder`; `by` says how it measures."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        self._num_threads = num_threads
        self._program = folder / "machine_limits"
        reason = self._build()
        self._has_program = reason is None
        self.by = "C++, -march=native" if reason is None else f"numpy, which reaches less ({reason})"

    def _build(self) -> str | None:
        """Why there is no program, if there is none."""
        self._program.parent.mkdir(parents=True, exist_ok=True)
        flags = ("-O3", "-march=native", "-std=c++17", "-pthread")
        try:
            find_compiler().run([*flags, "-o", str(self._program), str(_SOURCE)])
        except NativeError as error:
            return f"{str(error).splitlines()[0]:.200}"
        trial = self._run(1 << 20)
        if trial.returncode:
            return f"{_SOURCE.stem} ended with {trial.returncode}: {trial.stderr.strip()[-200:]}"
        return None

    def _run(self, num_bytes: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._program), str(self._num_threads), str(num_bytes)], capture_output=True, text=True
        )

    def measure(self) -> dict[str, Any]:
        """read_bytes_per_s, int8_per_s and bf16_per_s (operations: a multiply and an add are two), and by what."""
        if not self._has_program:
            return measure_with_numpy()
        run = self._run(READ_BYTES)
        run.check_returncode()
        limits: dict[str, Any] = json.loads(run.stdout)
        return limits


def measure_with_numpy() -> dict[str, Any]:
    """A sum over memory and a float32 product, as numpy computes them: lower bounds of what the machine can do."""
    words = np.ones(READ_BYTES // 8)
    matrix = np.ones((2048, 2048), np.float32)
    products_per_s = 2 * 2048**3 / _seconds(lambda: matrix @ matrix)
    return {
        "read_bytes_per_s": words.nbytes / _seconds(words.sum),
        "int8_per_s": products_per_s, "int8_by": "numpy float32",
        "bf16_per_s": products_per_s, "bf16_by": "numpy float32",
    }  # fmt: skip


def _seconds(run: Any) -> float:
    times = []
    for _ in range(3):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return min(times)
