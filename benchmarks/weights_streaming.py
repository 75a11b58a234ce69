"""The part of weights.py about decode steps: resident, streamed from the disk or the page cache, and llama.cpp.

A process for each line of the plot stays open, so that all take turns: rounds of a step of each, and of `dd` and the
store reading the same bytes. A process under a memory limit has one for itself, all of the same size.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import disk
from processes import Process, ProcessEnded, memory_limit
from report import RESULTS
from results_log import Results
from weights_model import FULL, QUICK, Files, Size

BATCHES = (1, 8, 32, 64)
NUM_STEPS = 1  # timed at a time; the rounds repeat it
CONTEXT_LEN = 16
RESIDENT, COLD, WARM = "resident", "streamed, cold", "streamed, warm"
COLD_LIMITED, LLAMA_LIMITED = "streamed, cold, limited", "llama.cpp with mmap, limited"
BOUNDS = {
    "bytes of the layers / bytes that a cold step has the disk read": 1.2,  # the ring is ahead by 3 layers of 22
    "cold step / max(bytes / dd's direct speed, resident step)": 1.25,
    "warm step / (bytes / dd's cached speed + resident step)": 1.0,
    "warm step / (bytes / the store's cached speed + resident step)": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, and the memory in which it is streamed."""

    name: str
    size: Size
    weights_memory: int
    memory_limit: int  # of a whole process where it is limited
    saved_bytes: int  # claimed: by so much a streaming process is smaller


FULL_SETTING = Setting(
    name="weights", size=FULL, weights_memory=600_000_000, memory_limit=1_200_000_000, saved_bytes=1_400_000_000
)
QUICK_SETTING = Setting(
    name="weights_quick", size=QUICK, weights_memory=160_000_000, memory_limit=800_000_000, saved_bytes=150_000_000
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepping:
    """How one process is started and opened."""

    script: str
    options: dict[str, Any]
    python: str = sys.executable
    is_limited: bool = False

    def open(self, stack: contextlib.ExitStack, limit_bytes: int) -> Process:
        """A process that is ready for steps, until `stack` ends it.

        Raises:
          ProcessEnded: it cannot be opened.
        """
        prefix = stack.enter_context(memory_limit(limit_bytes))[1] if self.is_limited else ()
        process = stack.enter_context(Process(self.script, python=self.python, prefix=prefix))
        process.ask("open", **self.options)
        return process


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What the rounds of one batch size gave, in the order of the rounds."""

    batch: int
    seconds: defaultdict[str, list[float]]  # of a step, by line
    speeds: defaultdict[tuple[str, str], list[float]]  # GB/s by who reads and from where
    disk_bytes: list[float]  # that a cold step had the disk read
    layer_bytes: list[float]  # that a step needs


def measure_steps(results: Results, setting: Setting, files: Files, peers: Path, repeats: int) -> None:
    """Rows, claims and the plot of decode steps."""
    place_files(files)
    steps: dict[str, dict[int, float]] = defaultdict(dict)
    ratios: dict[str, list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        processes = open_all(results, stack, setting, steppings(setting, files, peers))
        for batch in BATCHES:
            rounds = Rounds(batch, defaultdict(list), defaultdict(list), [], [])
            for number in range(repeats):
                results.say(f"batch {batch}, round {number + 1} of {repeats}")
                run_round(results, rounds, processes, files)
            if batch == BATCHES[0]:
                compare_memory(results, setting, processes)
            read_layers(rounds, processes)
            for name, seconds in rounds.seconds.items():
                steps[name][batch] = results.add("decode step", name, seconds, "s", batch=batch)
            for text, ratio in compare_steps(results, rounds).items():
                ratios[text].append(ratio)
    for text, bound in BOUNDS.items():
        results.claim(f"{text}: at most {bound:g} at every batch size", max(ratios[text]), at_most=bound)
    plot(steps, setting)


def place_files(files: Files) -> None:
    """Put each file where its readers expect it, in the page cache or not."""
    shutil.rmtree(files.cold_store, ignore_errors=True)
    shutil.copytree(files.store, files.cold_store)
    disk.drop(files.cold_store)
    disk.drop(files.gguf)  # so that what llama.cpp reads counts within its own limit
    disk.warm(files.store)
    disk.warm(files.weights)


def steppings(setting: Setting, files: Files, peers: Path) -> dict[str, Stepping]:
    """Every line of the plot; Millrace's options are equal but for where the weights are."""
    common: dict[str, Any] = {
        "num_slots": max(BATCHES), "max_step_tokens": 2 * max(BATCHES),
        "max_context_len": CONTEXT_LEN, "max_decode_steps": 1,
        "compile_cache_dir": str(files.folder / "programs"),
    }  # fmt: skip
    stream = common | {"weights": "stream", "weights_memory": setting.weights_memory}
    warm = stream | {"model": str(files.store), "weights_io": "cached"}
    cold = stream | {"model": str(files.cold_store), "weights_io": "direct"}
    llama = {
        "path": str(files.gguf), "num_slots": max(BATCHES), "context_len": CONTEXT_LEN,
        "num_threads": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    ours, peer = "weights_process.py", "weights_llama_cpp.py"
    return {
        RESIDENT: Stepping(script=ours, options=common | {"model": str(files.store)}),
        COLD: Stepping(script=ours, options=cold),
        WARM: Stepping(script=ours, options=warm),
        COLD_LIMITED: Stepping(script=ours, options=cold, is_limited=True),
        LLAMA_LIMITED: Stepping(script=peer, options=llama, python=str(peers / "bin" / "python"), is_limited=True),
    }


def open_all(
    results: Results, stack: contextlib.ExitStack, setting: Setting, lines: Mapping[str, Stepping]
) -> dict[str, Process]:
    """The processes that can be opened; one under a limit that cannot is reported as absent."""
    processes = {}
    for name, stepping in lines.items():
        results.say(f"opening: {name}")
        try:
            processes[name] = stepping.open(stack, setting.memory_limit)
        except ProcessEnded as reason:
            if not stepping.is_limited:
                raise
            results.absent("decode step", name, str(reason))
    return processes


def run_round(results: Results, rounds: Rounds, processes: dict[str, Process], files: Files) -> None:
    """A step of every process, and how fast `dd` reads, cold and warm."""
    for name, process in list(processes.items()):
        try:
            answer = process.ask("steps", batch=rounds.batch, num_steps=NUM_STEPS)
        except ProcessEnded as reason:
            if name not in (COLD_LIMITED, LLAMA_LIMITED):
                raise
            results.absent("decode step", name, f"at batch {rounds.batch} it {reason}")
            del processes[name]
            continue
        rounds.seconds[name].append(answer["seconds"])
        if name == COLD:
            rounds.disk_bytes.append(answer["disk_bytes"])
    for name in (COLD, WARM):
        rounds.speeds["dd", name].append(disk.read_speed(files.weights, direct=name == COLD) / 1e9)


def read_layers(rounds: Rounds, processes: Mapping[str, Process]) -> None:
    """How fast the store itself is read, cold and warm, while nothing is computed."""
    for name in (COLD, WARM):
        read = processes[name].ask("read")
        rounds.speeds["the store", name].append(read["num_bytes"] / read["seconds"] / 1e9)
        rounds.layer_bytes.append(read["num_bytes"])


def compare_memory(results: Results, setting: Setting, processes: Mapping[str, Process]) -> None:
    """Rows of every process' memory after its first steps, and how much a stream saves."""
    resident_sets = {}
    for name, process in processes.items():
        found = process.ask("memory")
        resident_sets[name] = found["resident"]
        for kind, num_bytes in found.items():
            results.add(f"memory, {kind}", name, [num_bytes / 1e6], "MB")
    saved = min(resident_sets[RESIDENT] - resident_sets[name] for name in (COLD, WARM))
    text = f"streaming makes the resident set {setting.saved_bytes / 1e9:g} GB smaller or more"
    results.claim(text, saved / 1e9, at_least=setting.saved_bytes / 1e9)


def compare_steps(results: Results, rounds: Rounds) -> dict[str, float]:
    """Rows of what was read and how fast; each ratio of BOUNDS."""
    disk_gb = results.add("read in a step", COLD, [b / 1e9 for b in rounds.disk_bytes], "GB", batch=rounds.batch)
    needed_gb = median(rounds.layer_bytes) / 1e9
    speeds = {
        (reader, name): results.add(f"read speed, {name}", reader, values, "GB/s", batch=rounds.batch)
        for (reader, name), values in rounds.speeds.items()
    }
    resident, cold, warm = (median(rounds.seconds[name]) for name in (RESIDENT, COLD, WARM))
    ratios = (
        needed_gb / max(disk_gb, 1e-9),
        cold / max(disk_gb / speeds["dd", COLD], resident),
        warm / (needed_gb / speeds["dd", WARM] + resident),
        warm / (needed_gb / speeds["the store", WARM] + resident),
    )
    for text, ratio in zip(BOUNDS, ratios, strict=True):
        results.add("ratio", text, [ratio], "x", batch=rounds.batch)
    return dict(zip(BOUNDS, ratios, strict=True))


def plot(steps: Mapping[str, Mapping[int, float]], setting: Setting) -> None:
    """Tokens per second against the batch size, as a picture beside the JSON."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, by_batch in steps.items():
        label = f"{name} to {setting.memory_limit / 1e9:g} GB" if "limited" in name else name
        axes.plot(list(by_batch), [batch / seconds for batch, seconds in by_batch.items()], marker="o", label=label)
    axes.set(xlabel="sequences in the batch", ylabel="tokens/s", xscale="log", yscale="log", xticks=BATCHES)
    axes.set_xticklabels(map(str, BATCHES))
    axes.set_title(f"Decoding; {setting.weights_memory / 1e6:g} MB of weights in memory where they are streamed")
    axes.grid(alpha=0.3)
    axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{setting.name}.png", dpi=150)
