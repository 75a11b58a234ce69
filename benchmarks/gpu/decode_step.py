"""The decode step of Llama-2-70B and Llama-3.1-8B shapes, whole and by layer: time, and shares of the chip's peaks.

    python benchmarks/gpu/decode_step.py --model=8b [--quantization=fp8] [--num_slots=256] [--context_len=2048]
    python benchmarks/gpu/decode_step.py --model=8b --scale=16 --num_layers=4 --num_slots=4 --context_len=64  # on a CPU

The runtime's own decode program is called on slots that all hold a full context of noise. A layer's time is the
difference between the whole model and a model of half its layers. Bytes are those of the weights and of the cache's
keys and values, each read once; peaks are those of sharding/targets.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
from random_weights import SHAPES, make_params, model_config
from report import report_gpu

from millrace import RuntimeConfig
from millrace.runtime.batching import NUM_FLAGS, Layout
from millrace.runtime.buckets import Bucket
from millrace.runtime.deployment import Deployment, deploy
from millrace.runtime.programs import compile_programs
from millrace.sharding.mesh import make_mesh
from millrace.sharding.targets import TARGETS

STEPS = 8  # of one dispatch
ROUNDS = 5


def deployment_of(options: argparse.Namespace, num_layers: int) -> Deployment:
    """As a runtime would make it, with a cache that holds every slot's context and no more."""
    quantization = None if options.quantization == "none" else options.quantization
    model = model_config(options.model, num_layers=num_layers, scale=options.scale, quantization=quantization)
    config = RuntimeConfig(
        dtype="bfloat16",
        kv_cache_dtype=options.kv_cache_dtype,
        max_context_len=options.context_len + 64,
        num_slots=options.num_slots,
        page_size=32,
        max_step_tokens=options.num_slots + 64,
        max_decode_steps=STEPS,
    )
    return deploy(config, model, make_mesh({}), 2**50)  # so much memory that the cache gets what it asks for


def control_of(deployment: Deployment, bucket: Bucket, context_len: int) -> tuple[np.ndarray, np.ndarray]:
    """A greedy step in which every slot decodes, its pages lying scattered."""
    layout = Layout(bucket, deployment.model.pages_per_slot)
    packed, flags = np.zeros((1, layout.width), np.int32), np.zeros(NUM_FLAGS, np.int32)
    fields = layout.views(packed)
    num_pages = bucket.num_rows * layout.pages_per_slot
    fields["slots"][0] = np.arange(bucket.num_rows)
    fields["budgets"][...] = flags[0] = STEPS
    fields["kv_lens"][...] = context_len
    fields["page_tables"][0] = np.random.default_rng(0).permutation(num_pages).reshape(bucket.num_rows, -1)
    return packed, flags


def step_s(deployment: Deployment, context_len: int) -> float:
    """Seconds of one decode step of all slots, the median of ROUNDS dispatches."""
    bucket = max(bucket for bucket in deployment.buckets if bucket.is_decode)
    programs = compile_programs(deployment.model, (bucket,), show_progress=True)
    params, state = make_params(deployment), programs.initial_state()
    control = control_of(deployment, bucket, context_len)
    times = []
    for _ in range(ROUNDS + 1):
        started_s = time.perf_counter()
        state, outputs = programs.steps[bucket](params, state, *control)
        jax.block_until_ready(outputs)
        times.append((time.perf_counter() - started_s) / STEPS)
    return float(np.median(times[1:]))


def peaks() -> Any:
    """The target that this machine's device is, else the CPU's."""
    kind = jax.devices()[0].device_kind
    exact = [target for target in TARGETS.values() if target.device_kind.split()[:2] == kind.split()[:2]]
    return exact[0] if exact else TARGETS["cpu"]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    num_layers = options.num_layers or SHAPES[options.model][2]
    whole = deployment_of(options, num_layers)
    config, slots, context = whole.model.decoder.config, options.num_slots, options.context_len
    times = {n: step_s(deployment_of(options, n), context) for n in (num_layers, num_layers // 2)}
    layer_s = (times[num_layers] - times[num_layers // 2]) / (num_layers - num_layers // 2)
    half = deployment_of(options, num_layers // 2)
    layer_bytes = (whole.weight_bytes - half.weight_bytes) / (num_layers - num_layers // 2)
    embedding_bytes = 2 * config.vocab_size * config.embed_dim  # of which only the tokens' rows are read
    element = jax.numpy.dtype(whole.model.cache.values.dtype).itemsize
    cache_bytes = slots * context * 2 * config.num_kv_heads * config.head_dim * element
    layer_weights = sum(_weights_of(config.layers[0], config.embed_dim))
    attention = 4 * context * config.layers[0].attention.num_heads * config.head_dim
    target = peaks()
    is_fp8 = options.quantization.startswith("fp8")
    peak = target.flops.get("float8" if is_fp8 else "bfloat16", target.flops["bfloat16"])

    def row(what: str, seconds: float, num_bytes: float, flops: float) -> dict[str, Any]:
        return {
            "what": what, "model": options.model, "quantization": options.quantization, "slots": slots,
            "context": context, "us": 1e6 * seconds, "tokens_per_s": slots / seconds,
            "memory_share": num_bytes / seconds / target.memory_bandwidth, "arithmetic_share": flops / seconds / peak,
        }  # fmt: skip

    layer_flops = slots * (2 * layer_weights + attention)
    head_flops = slots * 2 * config.vocab_size * config.embed_dim
    return [
        row("one layer", layer_s, layer_bytes + cache_bytes, layer_flops),
        row(
            f"step of {num_layers} layers",
            times[num_layers],
            whole.weight_bytes - embedding_bytes + num_layers * cache_bytes,
            num_layers * layer_flops + head_flops,
        ),
    ]


def _weights_of(layer: Any, embed_dim: int) -> tuple[int, int]:
    """Weights of attention and MLP."""
    attention = layer.attention
    heads = 2 * attention.num_heads + 2 * attention.num_kv_heads
    return heads * attention.head_dim * embed_dim, 3 * layer.mlp.mlp_dim * embed_dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--quantization", default="fp8", help="a format, or none")
    parser.add_argument("--kv_cache_dtype", default="fp8")
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--num_slots", type=int, default=256)
    parser.add_argument("--context_len", type=int, default=2048)
    options = parser.parse_args()
    report_gpu(f"gpu_decode_step_{options.model}", measure(options), {})


if __name__ == "__main__":
    main()
