"""Loading, converting and streaming weights, against the disk, safetensors and llama.cpp: ratios and a plot.

    python benchmarks/weights.py [--folder=DIR] [--peers=DIR] [--repeats=3] [--quick]

The model is a Llama of 1.1B random bf16 weights, made once in --folder, which must be on a disk that knows direct
I/O. Everything is timed in processes of its own, their start and imports excluded, in turns; numbers are medians.
"Warm" reads from the page cache, "cold" past it. --peers is a virtual environment with llama-cpp-python; without it
llama.cpp is reported as absent. --quick takes a smaller model, and proves nothing.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import disk
from processes import ProcessEnded, ask_once, limit_kind
from report import report
from results_log import Results
from weights_model import Files, make_model
from weights_streaming import FULL_SETTING, QUICK_SETTING, measure_steps


def measure_conversion(results: Results, files: Files, repeats: int) -> None:
    """Convert and copy in turns, the source in the page cache; the last store stays."""
    gigabytes = disk.num_bytes(files.weights) / 1e9
    disk.warm(files.weights)
    ours, theirs, peaks = [], [], []
    for _ in range(repeats):
        theirs.append(disk.copy_speed(files.weights, files.folder / "copy") / 1e9)
        shutil.rmtree(files.store, ignore_errors=True)
        os.sync()
        answer = ask_once("convert", source=str(files.checkpoint), destination=str(files.store))
        ours.append(gigabytes / answer["seconds"])
        peaks.append(answer["peak_bytes"] / 1e6)
    ratio = results.add("conversion, every file fsynced", "Millrace", ours, "GB/s")
    ratio /= results.add("copy, fsynced", "dd bs=4M conv=fsync", theirs, "GB/s")
    results.add("peak memory of the conversion", "Millrace", peaks, "MB")
    results.claim("conversion / dd's copy, both fsynced: at least 0.6", ratio, at_least=0.6)


def measure_warm_loads(results: Results, files: Files, repeats: int) -> None:
    """Load the same bytes from the page cache."""
    disk.warm(files.weights)
    disk.warm(files.store)
    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(ask_once("load_safetensors", path=str(files.weights))["seconds"])
        ours.append(ask_once("load_store", path=str(files.store), direct_io=False)["seconds"])
    ratio = results.add("load from page cache", "safetensors.flax", theirs, "s")
    ratio /= results.add("load from page cache", "Millrace", ours, "s")
    results.claim("safetensors.flax's time to load from page cache / Millrace's: at least 1", ratio, at_least=1)


def measure_cold_loads(results: Results, files: Files, repeats: int) -> None:
    """Load from the disk; `dd` reads the same bytes as the store's many files and as the checkpoint's one."""
    gigabytes = disk.num_bytes(files.weights) / 1e9
    ours, many, one, fresh = [], [], [], []
    for _ in range(repeats):
        disk.drop(files.store)
        ours.append(gigabytes / ask_once("load_store", path=str(files.store), direct_io=True)["seconds"])
        many.append(disk.read_speed(files.store, direct=True) / 1e9)
        one.append(disk.read_speed(files.weights, direct=True) / 1e9)
        fresh.append(disk.fresh_memory_speed(disk.num_bytes(files.weights)) / 1e9)
    ratio = results.add("load from disk, direct I/O", "Millrace", ours, "GB/s")
    results.add("touch fresh memory, one thread", "numpy", fresh, "GB/s")
    ratio /= max(
        results.add("read from disk", "dd bs=4M iflag=direct, the store's files", many, "GB/s"),
        results.add("read from disk", "dd bs=4M iflag=direct, model.safetensors", one, "GB/s"),
    )
    results.claim("load from a cold cache / the faster of dd's direct reads: at least 0.85", ratio, at_least=0.85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "millrace-benchmark")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    setting = QUICK_SETTING if options.quick else FULL_SETTING
    files = Files(options.folder.resolve() / setting.name)
    make_model(setting.size, files)
    results = Results()
    results.add("memory limit, where limited", limit_kind(setting.memory_limit), [setting.memory_limit / 1e6], "MB")
    try:
        measure_conversion(results, files, options.repeats)
        measure_warm_loads(results, files, options.repeats)
        measure_cold_loads(results, files, options.repeats)
        measure_steps(results, setting, files, options.peers, options.repeats)
    except ProcessEnded as error:
        raise SystemExit(f"a process of Millrace's {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # every process was ended on the way here
    report(setting.name, results.rows, results.claims)


if __name__ == "__main__":
    main()
