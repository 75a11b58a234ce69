"""`millrace demo`: what `make demo` runs. Streams from the embedded model, then says how fast and what next."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..flags import RUNTIME
from .pace import Pace
from .small import fitted, most_tokens

if TYPE_CHECKING:
    from ..api import Runtime
    from . import OpenRuntime

GROUPS = (RUNTIME,)

# No line end behind them: the model's tokens join it to the indentation that follows.
PROMPTS = ("def fibonacci(n):", "class Stack:\n    def __init__(self):", "def read_lines(path):")

# Where a next top-level thing begins, the completion of this one has ended.
STOPS = ("\ndef ", "\nclass ", "\n@", "\nif __name__", "\n\n\n")

NEXT = """
Next:
  .venv/bin/millrace generate --prompt 'class Queue:' --temperature 0.8 --seed 7
  .venv/bin/millrace generate --model path/to/a/hugging-face-folder --prompt 'Once upon a time'
  .venv/bin/millrace doctor          what this machine has; --help lists every flag
  make test                          and README.md, for the same from Python"""


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code, 0."""
    started_s = time.perf_counter()
    print("Loading the embedded model: a small one, trained on the Python standard library.", file=sys.stderr)
    with open_runtime(fitted(values, num_sequences=1, num_tokens=max(most_tokens([p]) for p in PROMPTS))) as runtime:
        print(f"Ready after {time.perf_counter() - started_s:.1f} s.\n", file=sys.stderr)
        paces = [_complete(runtime, prompt) for prompt in PROMPTS]
    num_decoded = sum(pace.num_decoded for pace in paces)
    decode_s = sum(pace.decode_s for pace in paces)
    tokens_per_s = num_decoded / decode_s if decode_s else paces[0].tokens_per_s
    first_ms = 1000 * sorted(pace.first_token_s for pace in paces)[len(paces) // 2]
    num_tokens = sum(pace.num_tokens for pace in paces)
    print(f"{num_tokens} tokens at {tokens_per_s:.0f} tokens/s, one request at a time; first token: {first_ms:.0f} ms")
    print(NEXT)
    return 0


def _complete(runtime: "Runtime", prompt: str) -> Pace:
    """Stream one completion behind its prompt."""
    params = runtime.default_sampling_params.replace(temperature=0.5, seed=11, max_tokens=96, stop=STOPS)
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{bold}{prompt}{plain}", end="", flush=True)
    pace = Pace()
    for output in runtime.stream(prompt, params):
        pace.note(len(output.outputs[0].token_ids), output.metrics)
        print(output.outputs[0].text, end="", flush=True)
    print("\n")
    return pace
