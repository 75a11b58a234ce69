"""llama.cpp's side of gguf_parity.py, run by the Python of an environment with llama-cpp-python 0.3.36 or later."""

from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from processes import serve


def logits(*, path: str, tokens: Sequence[int], place: str) -> dict[str, Any]:
    """Write the logits [tokens, vocabulary] of a text to a .npy file; the cache is in float32, nothing is fused."""
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False  # weights in the order of the file: 0.3.36 may crash on its own copies of them
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise SystemExit(f"llama.cpp could not open {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(256, len(tokens))
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    for row, token in enumerate(tokens):
        batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.logits[row] = token, row, 1, True
        batch.seq_id[row][0] = 0
    batch.n_tokens = len(tokens)
    if code := llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"llama_decode gave {code}")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (size,)) for row in range(len(tokens))]
    np.save(place, np.stack(rows).astype(np.float32))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return {"version": llama_cpp.__version__}


def tokenize(*, path: str, texts: Sequence[str]) -> dict[str, Any]:
    """The ids of texts, special tokens that are written out among them, and BOS where the file asks for it."""
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    return {"ids": [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]}


if __name__ == "__main__":
    serve({"logits": logits, "tokenize": tokenize})
