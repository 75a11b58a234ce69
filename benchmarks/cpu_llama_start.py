"""The shortest program that writes llama.cpp's first token: cpu_llama_start.py FILE.gguf TOKEN..."""

import os
import sys

import llama_cpp


def main() -> None:
    path, tokens = sys.argv[1], [int(token) for token in sys.argv[2:]]
    num_threads = len(os.sched_getaffinity(0))
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 2048
    params.n_threads = params.n_threads_batch = num_threads
    context = llama_cpp.llama_init_from_model(model, params)
    sampler = llama_cpp.llama_sampler_init_greedy()
    prompt = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points to it
    batch = llama_cpp.llama_batch_get_one(prompt, len(tokens))
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    print(llama_cpp.llama_sampler_sample(sampler, context, -1), flush=True)
    os._exit(0)  # the first token is all that is timed


if __name__ == "__main__":
    main()
