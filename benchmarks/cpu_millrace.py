"""Millrace's side of cpu_peers.py: a Runtime as anybody has it, asked for prompts and for steps of many sequences.

Prompts of the steps are found in the prefix cache from the second time on, each in pages of its own, so that a turn
need not compute them again; those of `prefill` are new every time.
"""

import time
from pathlib import Path
from typing import Any

import disk
import jax
from processes import memory, serve

from millrace import Runtime, SamplingParams
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.overrides import override

MARGIN_TOKENS = 32  # steps before and behind the timed ones, in which prompts are still computed or some have ended


class Peer:
    """One runtime."""

    _runtime: Runtime

    def open(self, *, overrides: list[str], **options: Any) -> dict[str, Any]:
        """Assemble it; `options` are RuntimeConfig's, and `overrides` NAME=VALUE for some of them."""
        self._runtime = Runtime(override(RuntimeConfig(**options, progress=False), overrides))
        return {"versions": f"jax {jax.__version__}", "features": f"{self._runtime.config.quantization}"}

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        """Seconds until the first token is there."""
        started_s = time.perf_counter()
        self._runtime.generate(prompt, _params(1), use_tqdm=False)
        return {"seconds": time.perf_counter() - started_s, "setting": ""}

    def decode(self, *, prompts: list[list[int]], num_steps: int) -> dict[str, Any]:
        """Seconds of a step of as many sequences as prompts.

        Tokens come by dispatches of some steps. Timed is from the last sequence's first dispatch of steps alone, when
        all prompts have been computed, to the last dispatch in which no sequence has ended.
        """
        params = _params(num_steps + 2 * MARGIN_TOKENS)
        handles = [self._runtime.submit(prompt, params) for prompt in prompts]
        times, counts = [], []
        for output in handles[-1]:
            times.append(time.perf_counter())
            counts.append(len(output.outputs[0].token_ids))
            if any(handle.finished for handle in handles):
                break
        for handle in handles:
            handle.result()
        first, last = 2, len(times) - 2  # the one before a sequence's end
        if last <= first:
            raise SystemExit(f"expected several dispatches of steps; {counts} tokens came")
        return {"seconds": (times[last] - times[first]) / sum(counts[first + 1 : last + 1]), "setting": ""}

    def sizes(self) -> dict[str, Any]:
        """Bytes of the process, and of what it needs: weights as their store has them, and the KV cache."""
        config = self._runtime.config
        # The folder may hold stores of checkpoints that were made before this one.
        stores = Path(config.store_cache_dir or "").glob("*/manifest.json")
        store = max(stores, key=lambda manifest: manifest.stat().st_mtime).parent
        needed = {"weights": disk.num_bytes(store / "params"), "kv_cache": config.kv_cache_bytes}
        return memory() | needed


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


if __name__ == "__main__":
    peer = Peer()
    serve({"open": peer.open, "prefill": peer.prefill, "decode": peer.decode, "sizes": peer.sizes, "memory": memory})
