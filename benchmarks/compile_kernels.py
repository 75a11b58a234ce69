"""Every GPU kernel at every size of kernel_cases.py, compiled for the chips that it is for, on a machine without a GPU.

    make compile-kernels        or, where the cuda extra is installed: python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --operation=paged_attention --implementation=hopper --chips=h200

Implementations are read off the operations' tables, so that a new one appears by itself; what it does not serve is
counted and named. A table has registers, spills and shared memory of each kernel, how many thread blocks of it a
multiprocessor holds, and the time below which the chip's memory or arithmetic cannot do the case. Each implementation
and chip has a process of its own, which starts again behind a case that ends it.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # before jax looks for a driver, which need not be here

import jax
from kernel_cases import TABLES, Case, cases, implementations
from kernel_resources import DUMP_ENVIRONMENT, parse_dump
from report import show, write

from millrace.errors import ConfigError
from millrace.pallas_kernels import tuning
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.sharding.targets import TARGETS, parse_target

CHIPS = ("h200", "gb300", "b200")
PLAIN = ("xla", "reference", "apart")  # implementations without a kernel of their own
_CASE_LIMIT_S = 300


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process compiles, one after the other."""

    operation: str
    implementation: str
    chip: str
    cases: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation}/{self.implementation} for {self.chip}"


def find_jobs(chips: Sequence[str], selected: Iterable[Case]) -> tuple[list[Job], list[dict[str, str]]]:
    """What is to be compiled, and what is not: each with the implementation's own reason."""
    wanted: dict[tuple[str, str, str], list[str]] = {}
    refused = []
    for case in selected:
        for chip in chips:
            for name, reason in implementations(case, TARGETS[chip].device_kind).items():
                if name in PLAIN:
                    continue
                if reason is None:
                    wanted.setdefault((case.operation, name, chip), []).append(case.name)
                else:
                    what = f"{case.operation}/{name}"
                    refused.append({"implementation": what, "chip": chip, "case": case.name, "reason": reason})
    return [Job(*key, tuple(names)) for key, names in wanted.items()], refused


def run_job(job: Job) -> Iterator[dict[str, Any]]:
    """A row for each kernel of each case; a case that ends its process gives one with what it said last."""
    left = list(job.cases)
    while left:
        output = _run_process(job, left)
        sections = re.split(r"^CASE (.*)$", output, flags=re.MULTILINE)[1:]
        found = dict(zip(sections[0::2], sections[1::2], strict=True))
        if not found:  # it did not even begin
            yield _failure(job, left[0], output)
            return
        for name, text in found.items():
            try:
                yield from _rows(job, name, text)
            except ValueError:  # kernels that an earlier case has compiled are not compiled again: a new process does
                yield from _rows_alone(job, name)
        left = left[left.index(list(found)[-1]) + 1 :]


def _rows_alone(job: Job, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a case that has a process of its own."""
    text = _run_process(job, [name])
    try:
        yield from _rows(job, name, text)
    except ValueError as error:
        yield _failure(job, name, f"ValueError: {error}")


def _run_process(job: Job, names: Sequence[str]) -> str:
    command = [sys.executable, __file__, "--child", json.dumps([job.operation, job.implementation, job.chip, names])]
    environment = {**os.environ, **DUMP_ENVIRONMENT}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            return process.communicate(timeout=_CASE_LIMIT_S * len(names))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0] + "\nit took too long and was ended"


def _rows(job: Job, name: str, text: str) -> Iterator[dict[str, Any]]:
    done = re.search(r"^DONE (.*)$", text, re.MULTILINE)
    if done is None:
        yield _failure(job, name, text)
        return
    facts = json.loads(done[1])
    calls = facts.pop("calls")
    kernels = parse_dump(text[: done.start()])
    for kernel in kernels:
        yield {
            **_labels(job, name),
            "kernel": kernel.name,
            "registers": kernel.registers,
            "spills": kernel.spill_bytes,
            "smem_kb": kernel.shared_bytes / 1024,
            "blocks_per_sm": kernel.occupancy,
            **facts,
            "result": "ok",
        }
    if not kernels:
        row = {**_failure(job, name, ""), **facts, "kernel": ", ".join(calls) or "-"}
        yield row | {"result": "ok" if calls else "FAILED: neither a kernel of its own nor a library's is in it"}


def _failure(job: Job, name: str, text: str) -> dict[str, Any]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\w*(\.\w+)*(Error|Exception)\b", line) or "error" in line[:30]]
    said = (errors or lines or ["nothing"])[-1]
    blank = dict.fromkeys(("kernel", "registers", "spills", "smem_kb", "blocks_per_sm", "bound_us", "bound_by"), "-")
    return {**_labels(job, name), **blank, "compile_s": "-", "result": f"FAILED: {said[:160]}"}


def _labels(job: Job, name: str) -> dict[str, str]:
    return {"operation": job.operation, "implementation": job.implementation, "chip": job.chip, "case": name}


def compile_here(operation: str, implementation: str, chip: str, names: Sequence[str]) -> None:
    """In the process of a job: compile each case, with a line before and after it on the compilers' own stream."""
    jax.config.update("jax_platforms", "cpu")
    by_name = {case.name: case for case in cases() if case.operation == operation}
    device = parse_target(chip).compile_devices()[0]
    kernels = KernelChoices("gpu", {operation: implementation}, device_kind=TARGETS[chip].device_kind)
    sizes = _watch_tuned_sizes()
    for name in names:
        _say(f"CASE {name}")
        case = by_name[name]
        sharding = jax.sharding.SingleDeviceSharding(device)
        shapes = jax.tree.map(
            lambda x, sharding=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.shapes()
        )
        started_s = time.perf_counter()
        try:
            lowered = jax.jit(lambda *args, case=case: case.call(kernels, *args)).lower(*shapes)
            compiled = lowered.compile(compiler_options=parse_target(chip).target.compiler_options)
        except Exception as error:
            _say(f"{type(error).__name__}: {error}"[:2000])
            continue
        facts = {**bound(case, chip), "compile_s": time.perf_counter() - started_s}
        calls = sorted(set(re.findall(r'custom_call_target="(\w+\$[\w$]+)"', compiled.as_text())))  # of libraries
        _say("DONE " + json.dumps(facts | {"sizes": sorted(sizes), "calls": calls}))
        sizes.clear()


def _watch_tuned_sizes() -> set[str]:
    """A set that gets the name of every tuned size that a kernel takes from now on."""
    taken: set[str] = set()
    read = tuning._read

    class Watched(dict[str, Any]):
        def __init__(self, path: Path) -> None:
            super().__init__(read(path))
            self._path = path

        def __getitem__(self, key: str) -> Any:
            taken.add(_size_name(self._path, key))
            return super().__getitem__(key)

    tuning._read = Watched  # type: ignore[assignment]
    return taken


def _size_name(path: Path, key: str) -> str:
    return f"{path.parent.parent.name}/{path.stem}: {key}"


def untried_sizes(rows: Sequence[dict[str, Any]], operations: Iterable[str]) -> list[str]:
    """Tuned sizes of the operations that no compiled case took."""
    folder = Path(tuning.__file__).parent
    files = [path for operation in operations for path in sorted((folder / operation).glob("tuning/*.json"))]
    known = [_size_name(path, key) for path in files for key in json.loads(path.read_text())]
    tried = {name for row in rows for name in row.get("sizes", ())}
    return [name for name in known if name not in tried]


def bound(case: Case, chip: str) -> dict[str, Any]:
    """The least time that the chip's memory and arithmetic allow."""
    target = TARGETS[chip]
    memory_s = case.moved_bytes() / target.memory_bandwidth
    compute_s = case.flops / target.flops.get(case.arithmetic, target.flops["bfloat16"])
    return {"bound_us": 1e6 * max(memory_s, compute_s), "bound_by": "memory" if memory_s > compute_s else "arithmetic"}


def _say(text: str) -> None:
    os.write(1, f"\n{text}\n".encode())  # in order with what the compilers print: nothing is held back


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--operation", choices=tuple(TABLES))
    parser.add_argument("--implementation")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.child:
        compile_here(*json.loads(options.child))
        return 0
    try:
        parse_target("h200").compile_devices()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    selected = [c for c in cases() if options.operation in (None, c.operation) and options.case in c.name]
    jobs, refused = find_jobs(options.chips.split(","), selected)
    jobs = [job for job in jobs if options.implementation in (None, job.implementation)]
    rows = []
    for job in jobs:
        print(f"{job}: {len(job.cases)} cases", file=sys.stderr, flush=True)
        rows += run_job(job)
    _print_refused(refused)
    if not rows:
        print("no kernel was asked to compile", file=sys.stderr)
        return 1
    claims = {"every kernel compiles for every chip that it is for": all(row["result"] == "ok" for row in rows)}
    is_whole = options.operation is None and options.implementation is None and not options.case
    if is_whole:
        untried = untried_sizes(rows, TABLES)
        print("".join(f"no case takes the tuned size {name}\n" for name in untried), end="")
        claims["every tuned size was compiled"] = not untried
    show("kernels_aot", [{key: value for key, value in row.items() if key != "sizes"} for row in rows], claims)
    if is_whole:
        write("kernels_aot", rows, claims, device="no GPU, for those of the rows")
    return 0 if all(claims.values()) else 1


def _print_refused(refused: Sequence[dict[str, str]]) -> None:
    """One line for each reason, with how often it was given."""
    counts: dict[tuple[str, str, str], int] = {}
    for each in refused:
        key = (each["implementation"], each["chip"], each["reason"])
        counts[key] = counts.get(key, 0) + 1
    for (implementation, chip, reason), count in counts.items():
        print(f"{implementation} on {chip} leaves {count} cases to others: {reason}")


if __name__ == "__main__":
    sys.exit(main())
