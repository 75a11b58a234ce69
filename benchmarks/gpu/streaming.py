"""Weights on the device, in the host's memory, and on disk: the same tokens, and what each costs a step.

    python benchmarks/gpu/streaming.py [--num_layers=32] [--scale=1] [--requests=64] [--folder=DIR]

A store of random weights of Llama-3.1-8B's shapes (16 GB; `--scale=16 --num_layers=4` for a small machine) is opened
three times, the budget of streamed weights being a quarter of the model; each prints its time per decode step, and
the bytes per second at which weights reached the device.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from random_weights import hf_config

from millrace import Runtime, SamplingParams
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.runtime.param_tree import flatten
from millrace.runtime.store_writer import save_store

NEW_TOKENS = 16


def make_store(folder: Path, config: dict[str, object]) -> int:
    """Random weights of variance 1 / fan-in; returns their bytes."""
    decoder = AbstractDecoder(config_from_hf(config), np.dtype(ml_dtypes.bfloat16))
    random = np.random.default_rng(0)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        block = random.standard_normal(shape[-2:], np.float32) * shape[-1] ** -0.5
        return np.broadcast_to(block.astype(ml_dtypes.bfloat16), shape)

    params = jax.tree.map(lambda spec: values(spec.shape), decoder.specs)
    save_store(folder, params, decoder.specs, config, {})
    return sum(spec.num_bytes for spec in flatten(decoder.specs)[0].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=32)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [[3 + (7 * i + j) % 500 for j in range(16)] for i in range(options.requests)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Path(folder) / "store"
        num_bytes = make_store(store, hf_config("8b", num_layers=options.num_layers, scale=options.scale))
        expected = None
        for weights in ("resident", "host", "stream"):
            budget = {} if weights == "resident" else {"weights_memory": num_bytes // 4}
            sizes = {"num_slots": options.requests, "max_context_len": 256, "max_decode_steps": 1}
            with Runtime.from_pretrained(str(store), weights=weights, **sizes, **budget) as runtime:
                runtime.generate(prompts, params, use_tqdm=False)
                started_s = time.perf_counter()
                outputs = runtime.generate(prompts, params, use_tqdm=False)
                step_s = (time.perf_counter() - started_s) / NEW_TOKENS
            tokens = [output.outputs[0].token_ids for output in outputs]
            expected = expected or tokens
            print(
                f"{weights:<9} {1000 * step_s:8.1f} ms a step   {num_bytes / step_s / 1e9:7.2f} GB/s of weights   "
                f"{'same tokens' if tokens == expected else 'OTHER TOKENS'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
