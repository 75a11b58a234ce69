"""Compile a Llama-3.1-8B runtime for one H200 on a machine without a GPU, and print what each program holds there.

    pip install -e '.[cuda]'
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/gpu/ahead_of_time.py

The numbers are the compiler's own (`memory_analysis`): arguments are weights, KV cache and slot state; what is
aliased is updated in place; temporaries beside the cache's size would betray a copy of it.
"""

import time

import jax.numpy as jnp
from jax.experimental import topologies
from llama import llama

from millrace.models.decoder import AbstractDecoder
from millrace.models.kv_cache import cache_spec
from millrace.models.partition import partition
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.runtime.buckets import Bucket
from millrace.runtime.programs import compile_programs
from millrace.runtime.steps import StepModel
from millrace.sharding.mesh import make_mesh
from millrace.sharding.targets import TARGETS

GIB = 2**30


def main() -> None:
    target = TARGETS["h200"]
    topology = topologies.get_topology_desc(
        target.name, platform="cuda", target_config=target.description, topology="1x1x1"
    )
    config = llama(num_layers=32)
    placement = partition(config, make_mesh({}, topology.devices))
    model = StepModel(
        decoder=AbstractDecoder(config, jnp.dtype("bfloat16")),
        placement=placement,
        kernels=KernelChoices("gpu"),
        cache=cache_spec(config, placement, num_pages=16384, page_size=32, dtype="bfloat16"),
        num_slots=256,
        pages_per_slot=256,
        max_context_len=8192,
        max_decode_steps=8,
    )
    print(f"KV cache {model.cache.num_bytes / GIB:.2f} GiB of {target.memory_bytes / GIB:.1f} GiB on {target.name}")
    for bucket in (Bucket(True, 256, 256), Bucket(False, 1024, 256)):
        started_s = time.perf_counter()
        memory = compile_programs(model, (bucket,), show_progress=False).steps[bucket].memory_analysis()
        print(
            f"{bucket!s:<28} compiled in {time.perf_counter() - started_s:5.1f} s   arguments "
            f"{memory.argument_size_in_bytes / GIB:.2f} GiB   in place {memory.alias_size_in_bytes / GIB:.2f} GiB   "
            f"temporaries {memory.temp_size_in_bytes / GIB:.2f} GiB"
        )
        streamed = compile_programs(model, (bucket,), streams=True, show_progress=False).steps[bucket]
        layer = streamed.layers[0].memory_analysis()
        print(
            f"{'  one layer of it, streamed':<28} arguments {layer.argument_size_in_bytes / GIB:.2f} GiB   in place "
            f"{layer.alias_size_in_bytes / GIB:.2f} GiB   temporaries {layer.temp_size_in_bytes / GIB:.2f} GiB"
        )


if __name__ == "__main__":
    main()
