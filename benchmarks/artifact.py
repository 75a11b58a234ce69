"""From process start to the first byte of text, compiling every program and loading them from an artifact.

    python benchmarks/artifact.py [--config=embedded] [--repeats=3]

Each run is a new process, as in startup.py, without a compile cache; the two kinds take turns.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

from report import report
from startup import fibonacci_command, first_byte_s

LIMIT = 1 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="embedded")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    plain = (f"--config={options.config}", "--compile_cache_dir=")
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "millrace.runtime.launch", "compile"]
        subprocess.run([*launcher, plain[0], "--no-progress", folder], check=True, stdout=subprocess.DEVNULL)
        compiled = fibonacci_command(*plain)
        loaded = [*compiled, f"--artifact={folder}"]
        runs = [(first_byte_s(compiled), first_byte_s(loaded)) for _ in range(options.repeats)]
    times = dict(zip(("compiled", "from the artifact"), zip(*runs, strict=True), strict=True))
    rows = [
        {"programs": programs, "runs": len(seconds), "median_s": statistics.median(seconds), "worst_s": max(seconds)}
        for programs, seconds in times.items()
    ]
    compiled_s, loaded_s = (row["median_s"] for row in rows)
    report("artifact", rows, {"from the artifact in at most a third of the time": loaded_s <= LIMIT * compiled_s})


if __name__ == "__main__":
    main()
