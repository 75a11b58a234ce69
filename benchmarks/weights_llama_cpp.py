"""llama.cpp's side of weights.py, run by the Python of an environment with llama-cpp-python 0.3.36 or later."""

import statistics
import time
from typing import Any

import llama_cpp
from processes import memory, serve


class Stepper:
    """One model, mapped into memory, and decode steps of any number of sequences up to `num_slots`."""

    def open(self, *, path: str, num_slots: int, context_len: int, num_threads: int) -> dict[str, Any]:
        """Map the file; every sequence has room for `context_len` tokens."""
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_slots * context_len
        params.kv_unified = True  # else each sequence would get 256 tokens, and the cache hundreds of megabytes
        params.n_seq_max = num_slots
        params.n_batch = params.n_ubatch = num_slots
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp could not open {path}")
        self._batch = llama_cpp.llama_batch_init(num_slots, 0, 1)
        return {"features": llama_cpp.llama_print_system_info().decode().strip()}

    def steps(self, *, batch: int, num_steps: int) -> dict[str, Any]:
        """Median seconds of a step that computes the logits of one more token of each sequence, from its first on.

        Nothing is sampled, which is in llama.cpp's favour.
        """
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        seconds = []
        for position in range(num_steps):
            for row in range(batch):
                self._batch.token[row] = 5 + row + position
                self._batch.pos[row] = position
                self._batch.n_seq_id[row] = 1
                self._batch.seq_id[row][0] = row
                self._batch.logits[row] = True
            self._batch.n_tokens = batch
            started_s = time.perf_counter()
            code = llama_cpp.llama_decode(self._context, self._batch)
            llama_cpp.llama_synchronize(self._context)
            seconds.append(time.perf_counter() - started_s)
            if code:
                raise SystemExit(f"llama_decode gave {code}")
        return {"seconds": statistics.median(seconds)}


if __name__ == "__main__":
    stepper = Stepper()
    serve({"open": stepper.open, "steps": stepper.steps, "memory": memory})
