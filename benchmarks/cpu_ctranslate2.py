"""CTranslate2's side of cpu_peers.py, run by the Python of an environment with ctranslate2, transformers and torch.

Its best known settings: weights and activations in int8 by its own conversion, one worker with as many threads as
cores, greedy search without scores, and the prompt's state computed once and kept (`static_prompt`), of which every
sequence gets a copy.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from processes import memory, serve

SKIPPED_STEPS = 2  # the first ones copy the prompt's state


def convert(*, source: str, destination: str) -> dict[str, Any]:
    """CTranslate2's folder of a Hugging Face one, in int8."""
    from ctranslate2.converters import TransformersConverter

    shutil.rmtree(destination, ignore_errors=True)
    TransformersConverter(source, low_cpu_mem_usage=True).convert(destination, quantization="int8")
    return {}


class Peer:
    """One model."""

    def open(self, *, path: str, num_threads: int) -> dict[str, Any]:
        """Load it."""
        import ctranslate2

        self._words = json.loads((Path(path) / "vocabulary.json").read_text())
        self._generator = ctranslate2.Generator(
            path, device="cpu", compute_type="int8", inter_threads=1, intra_threads=num_threads
        )
        types = ", ".join(sorted(ctranslate2.get_supported_compute_types("cpu")))
        return {"versions": f"ctranslate2 {ctranslate2.__version__}", "features": types}

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        """Seconds until the first token is there."""
        started_s = time.perf_counter()
        self._generate([prompt], num_tokens=1)
        return {"seconds": time.perf_counter() - started_s, "setting": "int8"}

    def decode(self, *, prompts: list[list[int]], num_steps: int) -> dict[str, Any]:
        """Seconds of a step of as many sequences as prompts, which are equally long; the first is everyone's."""
        times: dict[int, float] = {}

        def note(result: Any) -> bool:
            times[result.step] = time.perf_counter()  # at last, of the step's last sequence
            return False

        self._generate(
            [prompt[-1:] for prompt in prompts],
            num_tokens=SKIPPED_STEPS + num_steps,
            static_prompt=self._spell(prompts[0][:-1]),
            cache_static_prompt=True,
            callback=note,
        )
        last = max(times)
        return {"seconds": (times[last] - times[last - num_steps]) / num_steps, "setting": "int8"}

    def _generate(self, prompts: list[list[int]], *, num_tokens: int, **options: Any) -> None:
        self._generator.generate_batch(
            [self._spell(prompt) for prompt in prompts],
            max_length=num_tokens,
            min_length=num_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            **options,
        )

    def _spell(self, prompt: list[int]) -> list[str]:
        """Tokens as CTranslate2 takes them."""
        return [self._words[token] for token in prompt]


if __name__ == "__main__":
    peer = Peer()
    serve(
        {"convert": convert, "open": peer.open, "prefill": peer.prefill, "decode": peer.decode, "memory": memory}
    )  # fmt: skip
