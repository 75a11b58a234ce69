"""transformers' side of cpu_peers.py, run by the Python of an environment with transformers and torch.

Its best known settings: bfloat16, as many threads as cores, scaled_dot_product_attention, logits of the last token
only, and a cache that grows. A static one, and torch.compile over it, were tried once, at batch 1 and 64: no faster.
"""

import time
from typing import Any

from processes import memory, serve


class Peer:
    """One model."""

    def open(self, *, path: str, num_threads: int) -> dict[str, Any]:
        """Load it."""
        import torch
        import transformers

        torch.set_num_threads(num_threads)
        self._inference = torch.inference_mode()  # kept, for it ends with the object
        self._inference.__enter__()
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self._prompt: list[int] = []
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        return {"versions": versions, "features": torch.backends.cpu.get_cpu_capability()}

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        """Seconds until the first token is there."""
        import transformers

        started_s = time.perf_counter()
        self._step([prompt], transformers.DynamicCache(config=self._model.config))
        return {"seconds": time.perf_counter() - started_s, "setting": "sdpa"}

    def decode(self, *, prompts: list[list[int]], num_steps: int) -> dict[str, Any]:
        """Seconds of a step of as many sequences as prompts, which are equally long; the first is everyone's."""
        import transformers

        if self._prompt != prompts[0]:
            filled = transformers.DynamicCache(config=self._model.config)
            self._step(prompts[:1], filled)
            self._prompt, self._layers = prompts[0], [(layer.keys, layer.values) for layer in filled.layers]
        cache = transformers.DynamicCache(config=self._model.config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys.repeat(len(prompts), 1, 1, 1), values.repeat(len(prompts), 1, 1, 1), number)
        tokens = self._step([[5 + row] for row in range(len(prompts))], cache)
        started_s = time.perf_counter()
        for _ in range(num_steps):
            tokens = self._step([[token] for token in tokens], cache)
        return {"seconds": (time.perf_counter() - started_s) / num_steps, "setting": "sdpa"}

    def _step(self, rows: list[list[int]], cache: Any) -> list[int]:
        import torch

        logits = self._model(input_ids=torch.tensor(rows), past_key_values=cache, logits_to_keep=1).logits
        tokens: list[int] = logits[:, -1].argmax(-1).tolist()
        return tokens


if __name__ == "__main__":
    peer = Peer()
    serve({"open": peer.open, "prefill": peer.prefill, "decode": peer.decode, "memory": memory})
