"""Offline throughput of the whole runtime on one GPU: Llama-2-70B or Llama-3.1-8B shapes, random weights.

    python benchmarks/gpu/offline.py --model=70b [--quantization=fp8] [--kv_cache_dtype=fp8] [--seconds=120]
    python benchmarks/gpu/offline.py --model=8b --scale=16 --num_layers=2 --seconds=5 --requests=16 --num_slots=8 \
        --max_context_len=256 --max_step_tokens=64 --quantization=none --kv_cache_dtype=bfloat16   # a try on a CPU

All requests are there from the start, as in MLPerf's Offline scenario, with its lengths (lengths.py). A run of minutes
must not be all beginning, when no request has ended and slots are young: the first wave stands where a long run's
requests stand at any moment, some of their output already behind them, as part of their prompts. Tokens are counted
from when each of these has its first one to when the last request was started or the time was up: that is the steady
rate; and over everything. After --seconds of it what still runs is cancelled. --profile=S also says which kernels the
GPU's time went to, of S seconds in the middle.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from lengths import INPUT_QUANTILES, OUTPUT_QUANTILES, draw
from random_weights import model_config, random_runtime
from report import report_gpu, show
from step_profile import profile

from millrace import RequestOutput, RuntimeConfig, SamplingParams

_WARM_PROMPTS = 64
# tokens/s on one H200, offline: MLPerf v4.1 (TensorRT-LLM), v5.1 (vLLM, SGLang).
PEERS = {
    "70b": {"TensorRT-LLM": 4488, "SGLang": 3923, "vLLM": 3862},
    "8b": {"TensorRT-LLM": 8255, "second": 8114},
}


@dataclasses.dataclass(frozen=True)
class Load:
    """Random prompts, each with how many tokens it is to be answered with; the first wave fills all slots."""

    prompts: list[list[int]]
    num_outputs: list[int]
    num_first: int

    @property
    def params(self) -> list[SamplingParams]:
        """Greedy, and of a fixed length each."""
        return [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, seed=0) for n in self.num_outputs]


def make_load(count: int, vocab_size: int, max_len: int, num_slots: int) -> Load:
    """`count` requests behind a first wave of `num_slots`.

    A slot that is looked at at any moment holds a long request more often than a short one, in proportion to its
    length, and stands anywhere in it.
    """
    random = np.random.default_rng(0)
    inputs, outputs = draw(INPUT_QUANTILES, count, 1), draw(OUTPUT_QUANTILES, count, 2)
    met = random.choice(count, num_slots, p=outputs / outputs.sum())
    behind = (random.random(num_slots) * outputs[met]).astype(int)
    inputs = np.concatenate([inputs[met] + behind, inputs])
    outputs = np.concatenate([outputs[met] - behind, outputs])
    outputs = np.minimum(outputs, max_len // 2)
    inputs = np.minimum(inputs, max_len - outputs)
    return Load([random.integers(2, vocab_size, n).tolist() for n in inputs], outputs.tolist(), num_slots)


def steady_rate(outputs: list[RequestOutput], num_first: int, seconds: float) -> tuple[float, float]:
    """Output tokens a second from the last first token of the first wave to the last beginning, and how long that is.

    A request's tokens count as made evenly between its first and its last.
    """
    spans = [
        (m.time_to_first_token_s, m.total_s if m.total_s is not None else seconds, len(o.outputs[0].token_ids))
        for o in outputs
        if (m := o.metrics) is not None and m.time_to_first_token_s is not None
    ]
    if len(spans) < num_first:
        return 0.0, 0.0
    firsts, ends, counts = (np.array(column, float) for column in zip(*spans, strict=True))
    begin, end = firsts[:num_first].max(), min(firsts.max(), seconds)
    if end <= begin:
        return 0.0, 0.0
    inside = np.clip(np.minimum(ends, end) - np.maximum(firsts, begin), 0, None)
    at_once = (firsts == ends) & (firsts >= begin) & (ends <= end)  # in one dispatch
    shares = np.where(firsts == ends, at_once, inside / np.where(firsts == ends, 1, ends - firsts))
    return float((counts * shares).sum() / (end - begin)), float(end - begin)


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
    load = make_load(options.requests, model.vocab_size, options.max_context_len, options.num_slots)
    opened_s = time.perf_counter()
    with random_runtime(config, model, has_few_programs=options.few_programs) as runtime:
        setup_s = time.perf_counter() - opened_s
        warm = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        runtime.generate(load.prompts[:_WARM_PROMPTS], warm, use_tqdm=False)
        started_s = time.perf_counter()
        handles = [runtime.submit(prompt, each) for prompt, each in zip(load.prompts, load.params, strict=True)]
        for handle in handles[: load.num_first]:
            next(iter(handle))
        until = time.perf_counter() + options.seconds
        while time.perf_counter() < until and not all(h.finished for h in reversed(handles)):
            time.sleep(0.1)
        seconds = time.perf_counter() - started_s
        num_finished = sum(handle.finished for handle in handles)
        kernels = profile(options.profile) if options.profile else []
        for handle in handles:
            handle.cancel()
        outputs = [handle.result() for handle in handles]
        whole_s = time.perf_counter() - started_s
    total = sum(len(output.outputs[0].token_ids) for output in outputs)
    rate, measured_s = steady_rate(outputs, load.num_first, seconds)
    return {
        "model": options.model,
        "quantization": options.quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "steady_tokens_per_s": rate,
        "steady_s": measured_s,
        "all_tokens_per_s": total / whole_s,
        "finished": num_finished,
        "tokens": total,
        "seconds": seconds,
        "setup_s": setup_s,
        **{f"{peer}_tokens_per_s": rate for peer, rate in PEERS[options.model].items()},
        "kernels": kernels,
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
    parser.add_argument("--few_programs", action="store_true", help="compile full steps only, to begin sooner")
    parser.add_argument("--profile", type=float, default=0, help="seconds of which to say where the time went")
    options = parser.parse_args()
    row = measure(options)
    kernels = row.pop("kernels")
    if kernels:
        show("kernels", kernels[:40], {})
    best = max(PEERS[options.model].values())
    report_gpu(
        f"gpu_offline_{options.model}", [row], {f"at least {best:,} tokens/s": row["steady_tokens_per_s"] >= best}
    )


if __name__ == "__main__":
    main()
