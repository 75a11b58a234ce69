"""Host time of one step at full slots: plan + batch + commit, and the dispatch beside it.

    python benchmarks/step_overhead.py [--num_slots=32]

Plays the step loop with the embedded model by hand, one decode step a dispatch, and reports medians.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from millrace import SamplingParams
from millrace.runtime.assembly import assemble
from millrace.runtime.buckets import pick
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.request import validate

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_slots", 32, "sequences that run at once")
flags.DEFINE_integer("steps", 200, "steps that are measured")


class Stopwatch:
    """Milliseconds of each call, by name."""

    def __init__(self) -> None:
        self.times_ms: dict[str, list[float]] = {}

    def time[T](self, name: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        value = call()
        self.times_ms.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        return value


def measure(num_slots: int, num_steps: int) -> dict[str, float]:
    """Median milliseconds of each part of a step."""
    engine = assemble(RuntimeConfig(num_slots=num_slots, max_decode_steps=1, dtype="float32"))
    scheduler, executor = engine.scheduler, engine.executor
    params = SamplingParams(temperature=0, max_tokens=num_steps + 20, ignore_eos=True, seed=0)
    for i in range(num_slots):
        scheduler.add(validate(str(i), [1 + i, 2, 3, 4], params, engine.limits))
    watch, in_flight = Stopwatch(), None
    for step in range(num_steps + 10):
        if step == 10:
            watch.times_ms.clear()
        plan = watch.time("plan", scheduler.plan)
        assert plan is not None
        bucket = pick(executor.buckets, plan.is_decode, plan.num_tokens)
        watch.time("batch", lambda: executor.batcher.pack(plan, bucket))
        result = watch.time("batch + dispatch", lambda: executor.run(plan))
        if in_flight is not None:
            before, tokens = in_flight[0], watch.time("wait", in_flight[1].tokens)
            watch.time("commit", lambda: scheduler.commit(before, tokens))
        in_flight = (plan, result)
    return {name: statistics.median(times) for name, times in watch.times_ms.items()}


def main(argv: list[str]) -> None:
    del argv
    medians = measure(FLAGS.num_slots, FLAGS.steps)
    host = medians["plan"] + medians["batch"] + medians["commit"]
    row: dict[str, Any] = {
        "benchmark": "step_overhead",
        "num_slots": FLAGS.num_slots,
        "plan_ms": medians["plan"],
        "batch_ms": medians["batch"],
        "commit_ms": medians["commit"],
        "host_ms": host,
        "dispatch_ms": medians["batch + dispatch"] - medians["batch"],
        "wait_ms": medians["wait"],
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    for name, value in row.items():
        print(f"{name:<12} {value:.3f}" if isinstance(value, float) else f"{name:<12} {value}")
    path = Path(__file__).parent / "results" / "step_overhead.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
