"""One process of a group, for test_distributed.py: what it is to do comes as JSON in its first argument."""

import json
import sys
from typing import Any

import jax

from millrace import MillraceError, Runtime, SamplingParams


def main() -> int:
    given: dict[str, Any] = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", given["num_devices"])
    jax.config.update("jax_disable_most_optimizations", True)  # much is compiled here, and little computed
    try:
        with Runtime.from_pretrained("embedded", **given["options"]) as runtime:
            if "diverges" in given and not runtime.takes_requests:
                runtime._loop._scheduler.shards[0].free_slots.reverse()
            if not runtime.takes_requests:
                print("follows", flush=True)
                runtime.follow()
                return 0
            print(json.dumps(answers(runtime, given.get("is_endless", False))), flush=True)
    except MillraceError as error:
        print(f"millrace: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def answers(runtime: Runtime, is_endless: bool) -> dict[str, Any]:
    """Greedy, seeded, ended by a stop string, cancelled, and arriving while others run."""
    if is_endless:
        while True:
            runtime.generate("def", SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
            print("runs", flush=True)
    greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    first = runtime.submit("def fibonacci(n):", greedy)
    next(iter(first))
    later = [
        runtime.submit("import os", SamplingParams(max_tokens=12, seed=7, n=2, logit_bias={300: 1.5})),
        runtime.submit("class Stack:", greedy.replace(stop=["\n"])),
        *(runtime.submit([5 + i], greedy) for i in range(6)),
    ]
    cancelled = runtime.submit("while True:", SamplingParams(max_tokens=None, ignore_eos=True))
    next(iter(cancelled))
    cancelled.cancel()
    outputs = [handle.result() for handle in (first, *later)]
    return {
        "tokens": [[completion.token_ids for completion in output.outputs] for output in outputs],
        "reasons": [output.outputs[0].finish_reason for output in (*outputs, cancelled.result())],
        "scores": runtime.generate("x", greedy.replace(logprobs=1, max_tokens=2))[0].outputs[0].token_ids,
    }


if __name__ == "__main__":
    sys.exit(main())
