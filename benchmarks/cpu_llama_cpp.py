"""llama.cpp's side of cpu_peers.py, run by the Python of an environment with llama-cpp-python 0.3.36 or later.

Its best known settings: weights repacked for the CPU's instructions (the library's default), as many threads as cores
for prompts and for steps, a prompt computed in one batch, a cache of its own for each sequence (a unified one computes
every sequence's scores over all others' cells too), and flash attention on or off, whichever is faster for the cell.
Nothing is sampled, which is in llama.cpp's favour.
"""

import time
from functools import partial
from typing import Any

import llama_cpp
from cpu_settings import FastestSettings
from processes import memory, serve

FLASH = {
    "flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "no flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
MIN_CELLS = 256  # of a sequence's cache; llama.cpp rounds up to it


def quantize(*, source: str, destination: str, format: str) -> dict[str, Any]:
    """A GGUF file of another format; `pure`, so that the head is of it too, which is smaller and faster."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[format]
    params.pure = True
    if llama_cpp.llama_model_quantize(source.encode(), destination.encode(), params):
        raise SystemExit(f"llama.cpp could not quantize {source} to {format}")
    return {}


class Context:
    """A cache of `num_slots` sequences under one setting of flash attention."""

    def __init__(self, model: Any, *, num_slots: int, slot_len: int, num_threads: int, flash: int) -> None:
        params = llama_cpp.llama_context_default_params()
        self._num_slots = num_slots
        self._batch_len = max(slot_len if num_slots == 1 else MIN_CELLS, num_slots)
        params.n_ctx = num_slots * max(slot_len, MIN_CELLS)
        params.kv_unified = False
        params.n_seq_max = num_slots
        params.n_batch = params.n_ubatch = self._batch_len
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = flash
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp could not make a context: see its words above")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(self._batch_len, 0, 1)
        self._prompt_len = 0

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the logits of a prompt's last token are there, for sequence 0 of an empty cache."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self._prompt_len = 0
        return self._decode([(token, position, 0) for position, token in enumerate(prompt)], only_last=True)

    def steps(self, prompt: list[int], batch: int, num_steps: int) -> float:
        """Seconds of a step that computes one more token of each of `batch` sequences, the mean of `num_steps`.

        Every sequence has its own copy of the prompt's cache; what the steps append is removed again.
        """
        if self._prompt_len != len(prompt):
            self.prefill(prompt)
            for slot in range(1, self._num_slots):
                llama_cpp.llama_memory_seq_cp(self._memory, 0, slot, -1, -1)
            self._prompt_len = len(prompt)
        rows = [[(5 + slot + n, len(prompt) + n, slot) for slot in range(batch)] for n in range(num_steps + 1)]
        self._decode(rows[0])
        seconds = sum(self._decode(step) for step in rows[1:]) / num_steps
        for slot in range(batch):
            llama_cpp.llama_memory_seq_rm(self._memory, slot, len(prompt), -1)
        return seconds

    def _decode(self, rows: list[tuple[int, int, int]], *, only_last: bool = False) -> float:
        """Seconds for rows of token, position and sequence."""
        for row, (token, position, slot) in enumerate(rows):
            self._batch.token[row] = token
            self._batch.pos[row] = position
            self._batch.n_seq_id[row] = 1
            self._batch.seq_id[row][0] = slot
            self._batch.logits[row] = not only_last or row == len(rows) - 1
        self._batch.n_tokens = len(rows)
        started_s = time.perf_counter()
        code = llama_cpp.llama_decode(self._context, self._batch)
        llama_cpp.llama_synchronize(self._context)
        seconds = time.perf_counter() - started_s
        if code:
            raise SystemExit(f"llama_decode gave {code}")
        return seconds


class Peer:
    """One GGUF file."""

    def open(
        self, *, path: str, num_slots: int, max_prompt_len: int, slot_len: int, num_threads: int
    ) -> dict[str, Any]:
        """Load it; one cache holds one long prompt, another `num_slots` sequences of `slot_len` tokens."""
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp could not open {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        make = partial(Context, model, num_threads=num_threads)
        self._prompts = {name: make(num_slots=1, slot_len=max_prompt_len, flash=flash) for name, flash in FLASH.items()}
        self._slots = {name: make(num_slots=num_slots, slot_len=slot_len, flash=flash) for name, flash in FLASH.items()}
        self._fastest = FastestSettings()
        features = llama_cpp.llama_print_system_info().decode().strip()
        return {"versions": f"llama-cpp-python {llama_cpp.__version__}", "features": features}

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        """Seconds until the first token could be sampled."""
        settings = {name: partial(context.prefill, prompt) for name, context in self._prompts.items()}
        return self._fastest.measure(("prefill", len(prompt)), settings)

    def decode(self, *, prompts: list[list[int]], num_steps: int) -> dict[str, Any]:
        """Seconds of a step of as many sequences as prompts, which are equally long; the first is everyone's."""
        settings = {
            name: partial(context.steps, prompts[0], len(prompts), num_steps) for name, context in self._slots.items()
        }
        return self._fastest.measure(("decode", len(prompts)), settings)


if __name__ == "__main__":
    peer = Peer()
    serve(
        {"quantize": quantize, "open": peer.open, "prefill": peer.prefill, "decode": peer.decode, "memory": memory}
    )  # fmt: skip
