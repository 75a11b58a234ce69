"""Every implementation of every operation on the GPU: compared with the reference, timed, and held to its bound.

    python benchmarks/gpu/kernels.py [--operation=paged_attention] [--case=decode] [--seconds=150]
    python benchmarks/gpu/kernels.py --tiny        # a try on a CPU, of small problems

Cases are those of kernel_cases.py, in their order; what --seconds does not reach is named. Beside the kernels stand
XLA's own fusion of the operation (the implementation "xla") and copying: the bandwidth that a copy reaches here is
what "memory_share" is a share of. Others' kernels are measured by peers.py.

A second process does the work, for a wrong kernel ends the one that it runs in, or never ends itself: then the next
one goes on behind it.
"""

import argparse
import functools
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import TABLES, Case, attention_case, cases, implementations
from report import show, write
from timing import time_call

from millrace.pallas_kernels.dispatch import KernelChoices

_SILENCE_S = 60.0  # a unit of work takes less, compiling included

type Unit = tuple[str, str]  # a case and an implementation


# ---- the process that works


class Worker:
    """Runs units one after the other and says what it found, a line of JSON each."""

    def __init__(self, known: Sequence[Case]) -> None:
        device = jax.devices()[0]
        self._known = {case.name: case for case in known}
        self._platform = "cpu" if device.platform == "cpu" else "gpu"
        self._kind = device.device_kind
        self._case: Case | None = None
        self._arguments: tuple[Any, ...] = ()
        self._expected: np.ndarray | None = None

    def run(self, units: Sequence[Unit]) -> None:
        """Say hello, then for each unit that it begins, and what it found."""
        _say({"hello": {"device": self._kind, "copy_bytes_per_s": copy_bandwidth()}})
        for case_name, name in units:
            case = self._known[case_name]
            if self._platform == "gpu" and implementations(case, self._kind)[name] is not None:
                continue
            _say({"begin": [case_name, name]})
            try:
                self._take(case)
                row = self._measure(case, name)
            except Exception as error:
                _say({"row": {"error": f"{type(error).__name__}: {str(error)[:300]}"}})
                jnp.zeros(()).block_until_ready()  # a device that failed fails again, which ends this process
            else:
                _say({"row": row})

    def _take(self, case: Case) -> None:
        """Make the arguments of a case and what it should give."""
        if case is not self._case:
            self._case, self._arguments = None, ()
            self._arguments = jax.jit(case.arguments)(jax.random.key(7))
            self._expected = self._output(case, truth(case))
            self._case = case

    def _measure(self, case: Case, name: str) -> dict[str, Any]:
        output, expected = self._output(case, name), self._expected
        assert expected is not None
        seconds, how = time_call(functools.partial(case.call, self._choices(case, name)), self._arguments)
        return {
            "us": 1e6 * seconds,
            "difference": (apart := difference(output, expected)),
            "agrees": apart <= case.tolerance,
            "bytes_per_s": case.moved_bytes() / seconds,
            "tflops": case.flops / seconds / 1e12,
            "timed_by": how,
        }

    def _output(self, case: Case, name: str) -> np.ndarray:
        call = jax.jit(functools.partial(case.call, self._choices(case, name)))
        return np.asarray(call(*self._arguments).astype(jnp.float32))

    def _choices(self, case: Case, name: str) -> KernelChoices:
        return KernelChoices(self._platform, {case.operation: name}, device_kind=self._kind)


def truth(case: Case) -> str:
    """What a case is compared with: the reference gathers all keys for each query, which prompts do not allow."""
    return "xla" if case.operation == "paged_attention" and not case.is_decode else "reference"


def difference(output: np.ndarray, expected: np.ndarray) -> float:
    """The largest, as a share of the largest value; infinite where either is not a number."""
    if not (np.isfinite(output).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(output - expected).max() / max(np.abs(expected).max(), 1e-30))


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of copying 1 GiB."""
    x = jnp.ones(2**29 if jax.default_backend() != "cpu" else 2**20, jnp.bfloat16)
    seconds, _ = time_call(lambda x: x + jnp.bfloat16(1), (x,))
    return 2 * x.nbytes / seconds


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


# ---- the process that waits for it


def run_all(
    units: Sequence[Unit], flags: Sequence[str], deadline_s: float
) -> Iterator[tuple[Unit, dict[str, Any], dict[str, Any]]]:
    """Each unit that some implementation serves, what was found, and the worker's hello.

    A new worker goes on where one ended or fell silent.
    """
    left = list(units)
    while left and time.perf_counter() < deadline_s:
        hello: dict[str, Any] = {}
        begun: Unit | None = None
        said = ""
        for line in _lines([sys.executable, __file__, *flags, "--child", json.dumps(left)], deadline_s):
            message = json.loads(line) if line.startswith('{"') else {}
            if not message:
                said = line or said
            hello = message.get("hello", hello)
            if "begin" in message:
                begun = (message["begin"][0], message["begin"][1])
                left = left[left.index(begun) + 1 :]
            if begun is not None and "row" in message:
                yield begun, message["row"], hello
                begun = None
        if not hello:
            raise SystemExit(f"the worker ended before it began: {said}")
        if begun is None:
            return
        yield begun, {"error": f"its process ended: {said[-200:]}"}, hello
    for case_name, name in left:
        print(f"no time left for {name} on {case_name}", file=sys.stderr)


def _lines(command: Sequence[str], deadline_s: float) -> Iterator[str]:
    """A process' lines until it ends; it is ended when it is silent for long, or when the time is up."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", choices=tuple(TABLES))
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline_s = time.perf_counter() + options.seconds
    known = tiny_cases() if options.tiny else cases()
    if options.child:
        Worker(known).run([(case, name) for case, name in json.loads(options.child)])
        return
    jax.config.update("jax_platforms", "cpu")  # the GPU's memory is the worker's
    by_name = {case.name: case for case in known}
    wanted = [c for c in known if options.operation in (None, c.operation) and options.case in c.name]
    units = [(c.name, e.name) for c in wanted for e in TABLES[c.operation] if e.name != "reference"]
    rows: list[dict[str, Any]] = []
    claims: dict[str, bool] = {}
    for (case_name, name), found, hello in run_all(units, ["--tiny"] if options.tiny else [], deadline_s):
        rows.append(_row(by_name[case_name], name, found, hello["copy_bytes_per_s"]))
        claims = {"every kernel agrees with the reference": all(row["agrees"] is True for row in rows)}
        if hello["device"] != "cpu":
            write("gpu_kernels", rows, claims, hello["device"])
    if not rows:
        raise SystemExit("no implementation serves any of these cases")
    show("gpu_kernels", rows, claims)


def _row(case: Case, implementation: str, found: dict[str, Any], copy_bytes_per_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {"operation": case.operation, "case": case.name, "implementation": implementation}
    row |= dict.fromkeys(("us", "difference", "agrees", "memory_share", "tflops", "timed_by", "error"), "") | found
    if "bytes_per_s" in found:
        row["memory_share"] = row.pop("bytes_per_s") / copy_bytes_per_s
    return row | {"copy_tb_per_s": copy_bytes_per_s / 1e12}


if __name__ == "__main__":
    main()
