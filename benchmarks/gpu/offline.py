"""Offline throughput of the whole runtime on one GPU: Llama-2-70B or Llama-3.1-8B shapes, random weights.

    python benchmarks/gpu/offline.py --model=70b [--quantization=fp8] [--kv_cache_dtype=fp8] [--seconds=120]
    python benchmarks/gpu/offline.py --model=8b --scale=16 --num_layers=2 --seconds=5 --requests=16 --num_slots=8 \
        --max_context_len=256 --max_step_tokens=64 --quantization=none --kv_cache_dtype=bfloat16   # a try on a CPU

All requests are there from the start, as in MLPerf's Offline scenario, with its lengths (lengths.py). After --seconds
what still runs is cancelled. Tokens are counted from when the first request ended, so that the first wave of
prompts is over, to when the last one was started or the time was up: that is the steady rate; and over everything.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from lengths import INPUT_QUANTILES, OUTPUT_QUANTILES, draw
from random_weights import model_config, random_runtime
from report import report_gpu

from millrace import RequestOutput, RuntimeConfig, SamplingParams

# tokens/s on one H200, offline: MLPerf v4.1 (TensorRT-LLM), v5.1 (vLLM, SGLang).
PEERS = {
    "70b": {"TensorRT-LLM": 4488, "SGLang": 3923, "vLLM": 3862},
    "8b": {"TensorRT-LLM": 8255, "second": 8114},
}


def make_requests(count: int, vocab_size: int, max_len: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Random prompts, greedy and of a fixed length each."""
    random = np.random.default_rng(0)
    inputs, outputs = draw(INPUT_QUANTILES, count, 1), draw(OUTPUT_QUANTILES, count, 2)
    outputs = np.minimum(outputs, max_len // 2)
    inputs = np.minimum(inputs, max_len - outputs)
    prompts = [random.integers(2, vocab_size, n).tolist() for n in inputs]
    return prompts, [SamplingParams(temperature=0, max_tokens=int(n), ignore_eos=True, seed=0) for n in outputs]


def steady_rate(outputs: list[RequestOutput], seconds: float) -> float:
    """Output tokens a second between the first end and the last beginning.

    A request's tokens count as made evenly between its first and its last.
    """
    spans = [
        (m.time_to_first_token_s, m.total_s if m.total_s is not None else seconds, len(o.outputs[0].token_ids))
        for o in outputs
        if (m := o.metrics) is not None and m.time_to_first_token_s is not None
    ]
    if not spans:
        return 0.0
    firsts, ends, counts = (np.array(column, float) for column in zip(*spans, strict=True))
    begin, end = ends.min(), min(firsts.max(), seconds)
    if end <= begin:
        return 0.0
    shares = np.clip(np.minimum(ends, end) - np.maximum(firsts, begin), 0, None) / np.maximum(ends - firsts, 1e-9)
    return float((counts * shares).sum() / (end - begin))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    quantization = None if options.quantization == "none" else options.quantization
    model = model_config(options.model, num_layers=options.num_layers, scale=options.scale, quantization=quantization)
    config = RuntimeConfig(
        dtype="bfloat16",
        max_context_len=options.max_context_len,
        num_slots=options.num_slots,
        page_size=32,
        max_step_tokens=options.max_step_tokens,
        kv_cache_dtype=options.kv_cache_dtype,
        compile_cache_dir="",
    )
    prompts, params = make_requests(options.requests, model.vocab_size, options.max_context_len)
    opened_s = time.perf_counter()
    with random_runtime(config, model) as runtime:
        setup_s = time.perf_counter() - opened_s
        warm = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        runtime.generate(prompts[: options.num_slots], warm, use_tqdm=False)
        started_s = time.perf_counter()
        handles = [runtime.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        while time.perf_counter() < started_s + options.seconds and not all(h.finished for h in reversed(handles)):
            time.sleep(0.1)
        num_finished = sum(handle.finished for handle in handles)
        for handle in handles:
            handle.cancel()
        outputs = [handle.result() for handle in handles]
        seconds = time.perf_counter() - started_s
    total = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "model": options.model,
        "quantization": options.quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "steady_tokens_per_s": steady_rate(outputs, seconds),
        "all_tokens_per_s": total / seconds,
        "finished": num_finished,
        "tokens": total,
        "seconds": seconds,
        "setup_s": setup_s,
        **{f"{peer}_tokens_per_s": rate for peer, rate in PEERS[options.model].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PEERS), default="70b")
    parser.add_argument("--quantization", default="fp8", help="a format, or none")
    parser.add_argument("--kv_cache_dtype", default="fp8")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--requests", type=int, default=24576)
    parser.add_argument("--num_slots", type=int, default=768)
    parser.add_argument("--max_context_len", type=int, default=2048)
    parser.add_argument("--max_step_tokens", type=int, default=1536)
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--scale", type=int, default=1)
    options = parser.parse_args()
    row = measure(options)
    best = max(PEERS[options.model].values())
    report_gpu(
        f"gpu_offline_{options.model}", [row], {f"at least {best:,} tokens/s": row["steady_tokens_per_s"] >= best}
    )


if __name__ == "__main__":
    main()
