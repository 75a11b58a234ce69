"""Every implementation of every operation on the GPU: compared with the reference, timed, and held to its bound.

    python benchmarks/gpu/kernels.py [--operation=paged_attention] [--case=decode] [--seconds=150]
    python benchmarks/gpu/kernels.py --targets     # cases that have targets, and only what a runtime takes
    python benchmarks/gpu/kernels.py --tune        # tuned sizes beside others (tuning_candidates.py)
    python benchmarks/gpu/kernels.py --tiny        # a try on a CPU, of small problems

Cases are those of kernel_cases.py, in their order; what --seconds does not reach is named. Beside the kernels stand
XLA's own fusion of the operation (the implementation "xla") and copying: the bandwidth that a copy reaches here is
what "memory_share" is a share of. Others' kernels are measured by peers.py.

Other processes do the work (kernel_worker.py), for a wrong kernel ends the one that it runs in, or never ends itself:
then the next one goes on behind it.
"""

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from kernel_cases import TABLES, Case, attention_case, cases, has_target
from kernel_worker import CHOSEN, Unit, Worker
from report import show, write
from tuning_candidates import candidates

_SILENCE_S = 90.0  # a unit of work takes less, compiling and waiting for the GPU included
_MOST_WORKERS = 12
# A worker gives back what it does not use, for the others.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}

type Found = tuple[Unit, dict[str, Any], dict[str, Any]]  # a row, and its worker's hello


@dataclasses.dataclass(frozen=True)
class Run:
    """What all workers share: flags of the command, the file that locks the GPU, and when the time is up."""

    flags: Sequence[str]
    lock: Path
    deadline_s: float

    def all(self, shares: Sequence[Sequence[Unit]]) -> Iterator[Found]:
        """What workers find, one for each share, in the order in which they find it."""
        found: queue.SimpleQueue[Found | Exception | None] = queue.SimpleQueue()

        def work(share: Sequence[Unit]) -> None:
            try:
                for each in self.share(share):
                    found.put(each)
            except Exception as error:
                found.put(error)
            found.put(None)

        threads = [threading.Thread(target=work, args=(share,), daemon=True) for share in shares]
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            each = found.get()
            if each is None:
                left -= 1
            elif isinstance(each, Exception):
                print(each, file=sys.stderr)
            else:
                yield each

    def share(self, units: Sequence[Unit]) -> Iterator[Found]:
        """Each unit that some implementation serves; a new worker goes on where one ended or fell silent."""
        left = list(units)
        while left and time.perf_counter() < self.deadline_s:
            hello: dict[str, Any] = {}
            begun: Unit | None = None
            said, is_done, before = "", False, len(left)
            for line in _lines(self._command(left), self.deadline_s):
                message = json.loads(line) if line.startswith('{"') else {}
                if not message:
                    said = line or said
                hello = message.get("hello", hello)
                is_done = is_done or "done" in message
                if "begin" in message:
                    begun = Unit(*message["begin"])
                    left = left[left.index(begun) + 1 :]
                if begun is not None and "row" in message:
                    yield begun, message["row"], hello
                    begun = None
            if not hello:
                raise RuntimeError(f"a worker ended before it began: {said}")
            if begun is not None:
                yield begun, {"error": f"its process ended: {said[-200:]}"}, hello
            if is_done:
                return
            if len(left) == before:
                raise RuntimeError(f"a worker ended with nothing done: {said}")
        for unit in left:
            print(f"no time left for {unit.implementation} on {unit.case}", file=sys.stderr)

    def _command(self, units: Sequence[Unit]) -> list[str]:
        return [sys.executable, __file__, *self.flags, "--child", json.dumps([str(self.lock), units])]


def _lines(command: Sequence[str], deadline_s: float) -> Iterator[str]:
    """A process' lines until it ends; it is ended when it is silent for long, or when the time is up."""
    environment = {**os.environ, **_ENVIRONMENT}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line.strip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=max(0.1, min(_SILENCE_S, deadline_s - time.perf_counter())))
            except queue.Empty:
                process.kill()
                yield "it gave no answer in time"
                return
            if line is None:
                return
            print(line, file=sys.stderr)
            yield line


def tiny_cases() -> tuple[Case, ...]:
    """Small enough for a CPU."""
    return (attention_case("decode tiny", "bfloat16", [(1, 40), (1, 3), (1, 17)], heads=(4, 2, 64)),)


def find_units(options: argparse.Namespace, known: Sequence[Case]) -> list[Unit]:
    """What the options ask for, in the order of the cases."""
    wanted = [c for c in known if options.operation in (None, c.operation) and options.case in c.name]
    if options.targets:
        return [Unit(case.name, CHOSEN) for case in wanted if has_target(case)]
    pairs = [(c.name, e.name) for c in wanted for e in TABLES[c.operation] if e.name != "reference"]
    pairs = [(case, name) for case, name in pairs if options.implementation in (None, name)]
    if not options.tune:
        return [Unit(case, name) for case, name in pairs]
    tried = {case: list(candidates(case)) for case, _ in pairs}
    return [Unit(case, name, change) for case, name in pairs if tried[case] for change in ("", *tried[case])]


def shares_of(units: Sequence[Unit], num_workers: int, *, by_case: bool) -> list[list[Unit]]:
    """Units in turn to each worker, all those of a case to one of them where `by_case`."""
    numbers: dict[Any, int] = {}
    shares: list[list[Unit]] = [[] for _ in range(num_workers)]
    for unit in units:
        number = numbers.setdefault(unit.case if by_case else unit, len(numbers))
        shares[number % num_workers].append(unit)
    return [share for share in shares if share]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", choices=tuple(TABLES))
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--implementation", help="only this one")
    parser.add_argument("--targets", action="store_true", help="cases that have targets, and what a runtime takes")
    parser.add_argument("--tune", action="store_true", help="cases that have candidates, with each of them")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--workers", type=int, default=max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    deadline_s = time.perf_counter() + options.seconds
    known = tiny_cases() if options.tiny else cases()
    if options.child:
        lock, units = json.loads(options.child)
        Worker(known, Path(lock)).run([Unit(*unit) for unit in units])
        return
    jax.config.update("jax_platforms", "cpu")  # the GPU's memory is the workers'
    units = find_units(options, known)
    by_case = {case.name: case for case in known}
    name = "gpu_tuning" if options.tune else "gpu_kernels"
    rows: dict[Unit, dict[str, Any]] = {}
    claims: dict[str, bool] = {}
    device = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        run = Run(["--tiny"] if options.tiny else [], Path(folder) / "lock", deadline_s)
        for unit, found, hello in run.all(shares_of(units, options.workers, by_case=not options.tune)):
            rows[unit] = _row(by_case[unit.case], unit, found, hello["copy_bytes_per_s"])
            claims = {
                "every kernel agrees with the reference": all(row["agrees"] is True for row in rows.values()),
                "every kernel repeats itself bit by bit": all(row["repeats"] is True for row in rows.values()),
            }
            device = hello["device"]
            if device != "cpu":
                write(name, [rows[unit] for unit in units if unit in rows], claims, device)
    if not rows:
        raise SystemExit("no implementation serves any of these cases")
    show(name, [_short(rows[unit]) for unit in units if unit in rows], claims)


def _row(case: Case, unit: Unit, found: dict[str, Any], copy_bytes_per_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {"operation": case.operation, "case": case.name, "implementation": unit.implementation}
    row |= {"change": unit.change} if unit.change else {}
    blank = ("us", "difference", "agrees", "repeats", "memory_share", "tflops", "timed_by", "wrong", "error")
    row |= dict.fromkeys(blank, "") | found
    if "bytes_per_s" in found:
        row["memory_share"] = row.pop("bytes_per_s") / copy_bytes_per_s
    return row | {"copy_tb_per_s": copy_bytes_per_s / 1e12}


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Without what only the file holds."""
    return {key: value for key, value in row.items() if key not in ("operation", "kernels_us", "copy_tb_per_s")}


if __name__ == "__main__":
    main()
