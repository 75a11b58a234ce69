"""Tokens per second of 1 to 32 equal requests together: what batching brings.

    python benchmarks/batch_scaling.py [--model=embedded] [--max_tokens=128] [--repeats=5]

Every request decodes max_tokens tokens from a prompt of 16; the time is that of `generate`, prefill included. "One
slot" is measured twice: as one request on the runtime of 32 slots, and on a runtime that has one slot only; the
claim is against the faster of the two.
"""

import argparse
import statistics
import time

from report import report

from millrace import Runtime, SamplingParams

NUM_SLOTS = 32
PROMPT_LEN = 16
CLAIMED_RATIO = 8.0


def tokens_per_s(runtime: Runtime, num_requests: int, max_tokens: int, repeats: int) -> float:
    """Median over `repeats` rounds of different prompts, so that no prefix is found in the cache."""
    params = SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True)
    speeds = []
    for round in range(repeats + 1):
        prompts = [[5 + (7 * i + 3 * round + j * j) % 1000 for j in range(PROMPT_LEN)] for i in range(num_requests)]
        started_s = time.perf_counter()
        outputs = runtime.generate(prompts, params, use_tqdm=False)
        elapsed_s = time.perf_counter() - started_s
        speeds.append(sum(len(output.outputs[0].token_ids) for output in outputs) / elapsed_s)
    return statistics.median(speeds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    measured = {}
    for num_slots, requests in ((1, (1,)), (NUM_SLOTS, (1, 2, 4, 8, 16, NUM_SLOTS))):
        with Runtime.from_pretrained(options.model, num_slots=num_slots, progress=False) as runtime:
            for num_requests in requests:
                speed = tokens_per_s(runtime, num_requests, options.max_tokens, options.repeats)
                measured[num_slots, num_requests] = speed
    single = max(measured[1, 1], measured[NUM_SLOTS, 1])
    rows = [
        {"slots": slots, "requests": requests, "tokens_per_s": speed, "ratio": speed / single}
        for (slots, requests), speed in measured.items()
    ]
    ratio = rows[-1]["ratio"]
    claim = f"{NUM_SLOTS} slots give at least {CLAIMED_RATIO:g} times the tokens/s of one"
    report("batch_scaling", rows, {claim: ratio >= CLAIMED_RATIO})


if __name__ == "__main__":
    main()
