"""Builds the CPU kernels with sanitizers beside each driver of this folder, and runs the drivers.

usage: python tests/native/run.py [--seed=N] [--only=NAME] [--sanitizers=address,thread]

A driver is NAME_test.cc with a main() that takes a seed, tries random shapes on every instruction set that the machine
has, and exits with 0. ASan and UBSan go together, TSan by itself. What was built is kept in build/native.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from millrace.errors import NativeError
from millrace.pallas_kernels.native.build import SOURCES, compile_command
from millrace.pallas_kernels.native.compiler import Compiler, compiled_sources, find_compiler

DRIVERS = Path(__file__).parent
BUILD = DRIVERS.parents[1] / "build" / "native"
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-Werror", "-iquote", str(DRIVERS))
LIMIT_S = 900


def main() -> None:
    """Exits with 1 where a driver does not build or fails, and says how to run it again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--only", default="", help="a driver, as in --only=parallel")
    parser.add_argument("--sanitizers", default=",".join(SANITIZERS))
    arguments = parser.parse_args()
    drivers = sorted(DRIVERS.glob(f"{arguments.only or '*'}_test.cc"))
    failed = []
    try:
        compiler = find_compiler()
        for sanitizer in arguments.sanitizers.split(","):
            for program in build(compiler, sanitizer, drivers):
                if not passes(program, arguments.seed):
                    failed.append(f"{sanitizer}: {program.name}")
    except NativeError as error:
        sys.exit(str(error))
    if failed or not drivers:
        sys.exit(f"failed with --seed={arguments.seed}: {', '.join(failed) or 'there is no such driver'}")


def build(compiler: Compiler, sanitizer: str, drivers: Sequence[Path]) -> Iterator[Path]:
    """The drivers' programs, each linked with all of the library."""
    folder = BUILD / sanitizer
    folder.mkdir(parents=True, exist_ok=True)
    known_sets = compiler.known_sets()
    flags = (*FLAGS, *SANITIZERS[sanitizer])
    sources = compiled_sources(SOURCES, known_sets)
    headers = max(path.stat().st_mtime for place in (SOURCES, DRIVERS) for path in place.glob("*.h"))

    def compiled(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        if not output.exists() or output.stat().st_mtime < max(headers, source.stat().st_mtime):
            compiler.run(compile_command(source, output, known_sets, flags))
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip([*sources, *drivers], pool.map(compiled, [*sources, *drivers]), strict=True))
    library = [str(objects[source]) for source in sources]
    for driver in drivers:
        program = folder / driver.stem
        compiler.run([*SANITIZERS[sanitizer], "-pthread", str(objects[driver]), *library, "-o", str(program)])
        yield program


def passes(program: Path, seed: int) -> bool:
    """Run a driver, without address randomization where that can be had: older TSan does not bear the kernel's."""
    fixed = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    started_s = time.perf_counter()
    try:
        code = subprocess.run([*fixed, str(program), str(seed)], timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        code = "out of time"
    words = "passed" if code == 0 else f"FAILED ({code})"
    print(f"{program.parent.name:<8} {program.name:<24} {words} in {time.perf_counter() - started_s:.1f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    main()
