"""What the host does for a step of running slots: plan, batch and commit, and what stands beside them.

"deliver" gives each request's handle what the step brought it, which wakes those who read there.

    python benchmarks/step_overhead.py [--model=embedded] [--num_slots=32] [--num_steps=100]

The step loop's own order, by hand: plan step N+1, pack and dispatch it, then wait for step N and commit it. The wait
is the device's time and counts nowhere. Measured with one decode step per dispatch and with the default of several on
one device, and on 72 virtual CPU devices, a data shard each, with 16 slots a shard. There every step is waited for
before the host goes on, for 72 virtual devices would take the cores that are measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from report import report

from millrace.runtime.assembly import Engine, assemble
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.delivery import Delivery
from millrace.runtime.handle import RequestHandle
from millrace.runtime.request import validate
from millrace.runtime.sampling_params import SamplingParams

LIMIT_MS = 1.0
NUM_SHARDS, SHARD_SLOTS, SHARDS_LIMIT_MS = 72, 16, 3.0
WARM_UP = 20  # steps


def measure(engine: Engine, num_steps: int) -> dict[str, float]:
    """Median milliseconds of each part, over `num_steps` dispatches in which every slot decodes."""
    scheduler, executor = engine.scheduler, engine.executor
    num_slots = engine.config.num_slots
    num_sequences = num_slots * scheduler.config.num_shards
    params = SamplingParams(temperature=1.0, max_tokens=None, ignore_eos=True, seed=1)
    delivery = Delivery()
    for slot in range(num_sequences):
        prompt = [5 + (7 * slot + position) % 1000 for position in range(8)]
        request = validate(str(slot), prompt, params, engine.limits)
        delivery.take(RequestHandle(request, tokenizer=None, cancel=lambda handle: None))
        scheduler.add(request)
    times: dict[str, list[float]] = defaultdict(list)
    # The executor packs within run(): time that part on its own.
    executor.batcher.pack = timed(executor.batcher.pack, times["batch"])  # type: ignore[method-assign]
    plan, run = timed(scheduler.plan, times["plan"]), timed(executor.run, times["run"])
    commit, deliver = timed(scheduler.commit, times["commit"]), timed(delivery.deliver, times["deliver"])
    fetch = timed(lambda result: result.tokens(), times["fetch"])
    in_flight = None
    while len(times["commit"]) < num_steps + WARM_UP:
        step = plan()
        result = run(step) if step is not None else None
        if result is not None and scheduler.config.num_shards > 1:
            result.wait()
        if in_flight is not None:
            in_flight[1].wait()
            deliver(commit(in_flight[0], fetch(in_flight[1])), in_flight[1])
        in_flight = (step, result) if step is not None else None
        if len(times["plan"]) > WARM_UP and (
            step is None or sum(shard.num_rows for shard in step.shards) < num_sequences
        ):
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


def row(model: str, num_shards: int, num_slots: int, decode_steps: int, num_steps: int) -> dict[str, Any]:
    """One line of the table."""
    config = RuntimeConfig(
        model=model,
        num_slots=num_slots,
        max_decode_steps=decode_steps,
        mesh=(("data", num_shards),),
        progress=False,
    )
    medians = measure(assemble(config), num_steps)
    host_ms = medians["plan"] + medians["batch"] + medians["commit"]
    made = {"decode_steps": decode_steps, "shards": num_shards, "slots": num_shards * num_slots}
    made |= {f"{name}_ms": medians[name] for name in ("plan", "batch", "commit")}
    made["plan+batch+commit_ms"] = host_ms
    return made | {f"{name}_ms": medians[name] for name in ("deliver", "dispatch", "fetch")}


def row_of_shards(model: str, num_steps: int) -> dict[str, Any]:
    """The line of 72 devices, from a process of its own: jax decides once how many devices a CPU is."""
    command = [sys.executable, __file__, "--shards_only", f"--model={model}", f"--num_steps={num_steps}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num_slots", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--shards_only", action="store_true", help="print the line of 72 devices as JSON, and no more")
    options = parser.parse_args()
    if options.shards_only:
        jax.config.update("jax_num_cpu_devices", NUM_SHARDS)
        print(json.dumps(row(options.model, NUM_SHARDS, SHARD_SLOTS, 1, options.num_steps)))
        return
    several = RuntimeConfig().max_decode_steps
    rows = [row(options.model, 1, options.num_slots, steps, options.num_steps) for steps in (1, several)]
    rows.append(row_of_shards(options.model, options.num_steps))
    claims = {
        f"plan + batch + commit take at most {LIMIT_MS:g} ms at {options.num_slots} slots": rows[0],
        f"and at most {SHARDS_LIMIT_MS:g} ms at {NUM_SHARDS * SHARD_SLOTS} slots of {NUM_SHARDS} shards": rows[-1],
    }
    limits = (LIMIT_MS, SHARDS_LIMIT_MS)
    held = [made["plan+batch+commit_ms"] <= limit for made, limit in zip(claims.values(), limits, strict=True)]
    report("step_overhead", rows, dict(zip(claims, held, strict=True)))


if __name__ == "__main__":
    main()
