"""Tokens per second of a runtime with random weights on one GPU: prefill, and decode at several batch sizes.

python benchmarks/gpu/throughput.py [--model=8b] [--quantization=none] [--num_slots=256]
python benchmarks/gpu/throughput.py --num_layers=2 --scale=16 --num_slots=8     # a try on a CPU
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from random_weights import SHAPES, model_config, random_runtime
from report import report_gpu

from millrace import Runtime, RuntimeConfig, SamplingParams


def tokens_per_s(runtime: Runtime, batch: int, prompt_len: int, num_new: int, vocab_size: int) -> float:
    """Of prompts where one token is sampled, of new tokens elsewhere; the first of three rounds warms up."""
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, seed=0)
    rates = []
    for number in range(3):
        start = 11 * number  # other prompts each time, or their pages would be known
        prompts = [[(7 * i + j + start) % vocab_size for j in range(prompt_len)] for i in range(batch)]
        started_s = time.perf_counter()
        runtime.generate(prompts, params, use_tqdm=False)
        rates.append(batch * (prompt_len if num_new == 1 else num_new) / (time.perf_counter() - started_s))
    return max(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--quantization", default="none", help="a format, or none")
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--num_slots", type=int, default=256)
    options = parser.parse_args()
    quantization = None if options.quantization == "none" else options.quantization
    model = model_config(options.model, num_layers=options.num_layers, scale=options.scale, quantization=quantization)
    config = RuntimeConfig(
        dtype="bfloat16", max_context_len=2048, num_slots=options.num_slots, page_size=32, max_step_tokens=1024,
        prefix_caching=False, compile_cache_dir="",
    )  # fmt: skip
    rows = []
    with random_runtime(config, model) as runtime:
        for batch in sorted({1, 8, 32, options.num_slots}):
            for what, prompt_len, num_new in (("prefill", 512, 1), ("decode", 16, 128)):
                rate = tokens_per_s(runtime, batch, prompt_len, num_new, model.vocab_size)
                rows.append({"what": what, "batch": batch, "tokens_per_s": rate})
    report_gpu("gpu_throughput", rows, {})


if __name__ == "__main__":
    main()
