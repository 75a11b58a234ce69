"""Tokens per second of a Llama-3.1-8B with random weights on one GPU: prefill, and decode at several batch sizes.

    python benchmarks/gpu/throughput.py [--layers=32] [--num_slots=256]
    python benchmarks/gpu/throughput.py --layers=2 --scale=8 --num_slots=8 --pages=512     # a try on a CPU

Drives scheduler and executor by hand, as the step loop does. The weights are made on the device.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from llama import llama
from report import report

from millrace import SamplingParams
from millrace.models.decoder import AbstractDecoder
from millrace.models.kv_cache import cache_spec
from millrace.models.partition import partition
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.runtime.buckets import make_buckets
from millrace.runtime.executor import Executor
from millrace.runtime.program_specs import abstract_params
from millrace.runtime.programs import compile_programs
from millrace.runtime.request import RequestLimits, validate
from millrace.runtime.scheduler import Scheduler, SchedulerConfig
from millrace.runtime.steps import StepModel
from millrace.sharding.mesh import make_mesh

CONTEXT_LEN, PAGE_SIZE, STEP_TOKENS, DECODE_STEPS = 2048, 32, 1024, 8


def build(options: argparse.Namespace) -> tuple[Scheduler, Executor]:
    config = llama(options.layers, options.scale)
    placement = partition(config, make_mesh({}))
    model = StepModel(
        decoder=AbstractDecoder(config, jnp.dtype("bfloat16")),
        placement=placement,
        kernels=KernelChoices("cpu" if jax.default_backend() == "cpu" else "gpu"),
        cache=cache_spec(config, placement, options.pages, PAGE_SIZE, "bfloat16"),
        num_slots=options.num_slots,
        pages_per_slot=CONTEXT_LEN // PAGE_SIZE,
        max_context_len=CONTEXT_LEN,
        max_decode_steps=DECODE_STEPS,
    )
    buckets = make_buckets(options.num_slots, STEP_TOKENS)
    programs = compile_programs(model, buckets, show_progress=True)
    shapes = abstract_params(model)
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    make = jax.jit(
        lambda key: jax.tree.map(lambda s: 0.02 * jax.random.normal(key, s.shape, s.dtype), shapes),
        out_shardings=shardings,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            num_shards=1,
            num_slots=options.num_slots,
            num_pages=options.pages,
            page_size=PAGE_SIZE,
            max_context_len=CONTEXT_LEN,
            max_step_tokens=STEP_TOKENS,
            max_decode_steps=DECODE_STEPS,
            prefix_caching=False,
        )
    )
    return scheduler, Executor(model, buckets, programs, make(jax.random.key(0)))


def play(scheduler: Scheduler, executor: Executor) -> float:
    """Seconds until every queued sequence has ended."""
    started_s, in_flight = time.perf_counter(), None
    while True:
        plan = scheduler.plan()
        result = executor.run(plan) if plan is not None else None
        if in_flight is not None:
            scheduler.commit(in_flight[0], in_flight[1].tokens())
        if plan is None or result is None:
            return time.perf_counter() - started_s
        in_flight = (plan, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--num_slots", type=int, default=256)
    parser.add_argument("--pages", type=int, default=8192)
    options = parser.parse_args()
    scheduler, executor = build(options)
    vocab_size = 128256 // options.scale
    limits = RequestLimits(vocab_size=vocab_size, max_context_len=CONTEXT_LEN, eos_ids=(), tokenizer=None)
    rows = []
    for batch in sorted({1, 8, 32, options.num_slots} & set(range(options.num_slots + 1))):
        for what, prompt_len, num_new in (("prefill", 512, 1), ("decode", 16, 128)):
            params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, seed=0)
            for _ in range(2):  # the first round warms up
                for i in range(batch):
                    prompt = [(7 * i + j) % vocab_size for j in range(prompt_len)]
                    scheduler.add(validate(f"{i}", prompt, params, limits))
                elapsed_s = play(scheduler, executor)
            counted = batch * (prompt_len if what == "prefill" else num_new)
            rows.append({"what": what, "batch": batch, "tokens_per_s": counted / elapsed_s})
    report("gpu_throughput", rows, {})


if __name__ == "__main__":
    main()
