"""What the host does for a step of 32 running slots: plan, batch and commit, and the dispatch beside them.

    python benchmarks/step_overhead.py [--model=embedded] [--num_slots=32] [--num_steps=100]

The step loop's own order, by hand: plan step N+1, pack and dispatch it, then wait for step N and commit it. The wait
is the device's time and counts nowhere. Measured with one decode step per dispatch and with the default of several.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from report import report

from millrace.runtime.assembly import Engine, assemble
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.request import validate
from millrace.runtime.sampling_params import SamplingParams

LIMIT_MS = 1.0
WARM_UP = 20  # steps


def measure(engine: Engine, num_steps: int) -> dict[str, float]:
    """Median milliseconds of each part, over `num_steps` dispatches in which every slot decodes."""
    scheduler, executor = engine.scheduler, engine.executor
    num_slots = engine.config.num_slots
    params = SamplingParams(temperature=1.0, max_tokens=None, ignore_eos=True, seed=1)
    for slot in range(num_slots):
        prompt = [5 + (7 * slot + position) % 1000 for position in range(8)]
        scheduler.add(validate(str(slot), prompt, params, engine.limits))
    times: dict[str, list[float]] = defaultdict(list)
    # The executor packs within run(): time that part on its own.
    executor.batcher.pack = timed(executor.batcher.pack, times["batch"])  # type: ignore[method-assign]
    plan, run, commit = (
        timed(verb, times[name])
        for verb, name in ((scheduler.plan, "plan"), (executor.run, "run"), (scheduler.commit, "commit"))
    )
    in_flight = None
    while len(times["commit"]) < num_steps + WARM_UP:
        step = plan()
        result = run(step) if step is not None else None
        if in_flight is not None:
            tokens = in_flight[1].tokens()
            commit(in_flight[0], tokens)
        in_flight = (step, result) if step is not None else None
        if len(times["plan"]) > WARM_UP and (step is None or step.shards[0].num_rows < num_slots):
            raise SystemExit(f"only {len(times['plan'])} full dispatches fit the context: lower --num_steps")
    times["dispatch"] = [run - batch for run, batch in zip(times.pop("run"), times["batch"], strict=True)]
    return {name: 1000 * statistics.median(values[WARM_UP:]) for name, values in times.items()}


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`call`, which also appends how long it took."""

    def timed_call(*arguments: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            seconds.append(time.perf_counter() - started_s)

    return timed_call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num_slots", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=100)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for max_decode_steps in (1, RuntimeConfig().max_decode_steps):
        config = RuntimeConfig(
            model=options.model, num_slots=options.num_slots, max_decode_steps=max_decode_steps, progress=False
        )
        medians = measure(assemble(config), options.num_steps)
        host_ms = medians["plan"] + medians["batch"] + medians["commit"]
        row = {"decode_steps": max_decode_steps, "slots": options.num_slots}
        row |= {f"{name}_ms": medians[name] for name in ("plan", "batch", "commit")}
        rows.append(row | {"plan+batch+commit_ms": host_ms, "dispatch_ms": medians["dispatch"]})
    claim = f"plan + batch + commit take at most {LIMIT_MS:g} ms at {options.num_slots} slots"
    report("step_overhead", rows, {claim: rows[0]["plan+batch+commit_ms"] <= LIMIT_MS})


if __name__ == "__main__":
    main()
