"""From process start to the first byte of text, with a cold and with a warm compile cache.

    python benchmarks/startup.py [--model=embedded] [--repeats=5]

Each run is a new process, `millrace generate --prompt='def fibonacci(n):'`, timed from outside. The cold run has an
empty compile cache and quantizes the weights, the warm ones have what it left; all files lie in the page cache.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from report import report

LIMITS_S = {"cold": 20.0, "warm": 4.0}


def generate_command(*flags: str) -> list[str]:
    """`millrace generate` with these flags."""
    return [sys.executable, "-m", "millrace.runtime.launch", "generate", "--temperature=0", *flags]


def fibonacci_command(*flags: str) -> list[str]:
    """The same, of what the embedded model is asked."""
    return generate_command("--max_tokens=32", "--prompt=def fibonacci(n):", *flags)


def first_byte_s(command: Sequence[str]) -> float:
    """Seconds until a new process writes its first byte of text."""
    started_s = time.perf_counter()
    # What it says goes to a file: a pipe that nobody reads would stop a process that says much.
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout
        byte = process.stdout.read(1)
        elapsed_s = time.perf_counter() - started_s
        process.communicate()
        errors.seek(0)
        words = errors.read().decode(errors="replace").strip()
    if not byte or process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {process.returncode}: {words[-500:]}")
    return elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache_dir:
        command = fibonacci_command(
            f"--model={options.model}",
            f"--compile_cache_dir={cache_dir}/programs",
            f"--store_cache_dir={cache_dir}/stores",
        )
        times = {"cold": [first_byte_s(command)]}
        times["warm"] = [first_byte_s(command) for _ in range(options.repeats)]
    rows = [
        {"cache": cache, "runs": len(runs), "median_s": statistics.median(runs), "worst_s": max(runs)}
        for cache, runs in times.items()
    ]
    claims = {
        f"{row['cache']}: first token within {LIMITS_S[row['cache']]:g} s": row["median_s"] <= LIMITS_S[row["cache"]]
        for row in rows
    }
    report("startup", rows, claims)


if __name__ == "__main__":
    main()
