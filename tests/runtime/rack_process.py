"""A process with many CPU devices: the same requests over one mesh after the other.

For test_mesh: the number of devices is fixed when a process starts. Reads one JSON object, {"config": a checkpoint's
config.json, "meshes", "folder"}, and prints the tokens of each mesh as JSON. The weights are random.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from millrace import Runtime, SamplingParams
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.runtime.store_writer import save_store

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=5, ignore_eos=True)
FIRST = [([3 + i] * (1 + i), (GREEDY, SEEDED)[i % 2]) for i in range(4)]
LATER = [([40 + i] * (4 - i), (SEEDED, GREEDY)[i % 2]) for i in range(4)]


def write_store(config: dict[str, Any], place: Path) -> None:
    """A store of random weights."""
    specs = AbstractDecoder(config_from_hf(config), np.dtype("float32")).specs
    random = np.random.default_rng(7)
    draw = lambda spec: random.normal(size=spec.shape).astype(np.float32) * 0.3  # noqa: E731
    save_store(place, jax.tree.map(draw, specs), specs, config, {})


def tokens_over(mesh: dict[str, int], store: Path) -> list[list[int]]:
    """What every request gets; the later ones arrive when the first has begun to answer."""
    small = {"num_slots": 2, "page_size": 8, "max_step_tokens": 8, "max_context_len": 16, "dtype": "float32"}
    options: dict[str, Any] = {"mesh": mesh, "compile_cache_dir": "", "progress": False, "kv_cache_bytes": 1 << 16}
    with Runtime.from_pretrained(str(store), **small, **options) as runtime:
        stream = iter(runtime.stream(*FIRST[0]))
        handles = [runtime.submit(*request) for request in FIRST]
        next(stream)
        handles += [runtime.submit(*request) for request in LATER]
        return [list(handle.result().outputs[0].token_ids) for handle in handles]


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # much is compiled here, and little computed
    task = json.loads(sys.stdin.read())
    store = Path(task["folder"]) / "store"
    write_store(task["config"], store)
    print(json.dumps([tokens_over(mesh, store) for mesh in task["meshes"]]))


if __name__ == "__main__":
    main()
