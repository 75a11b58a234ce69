"""Llama 2 70B on two H200 (141 GB each): in bfloat16 the weights are 138 GB, too many for one beside a cache."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """A token of KV cache is 160 KiB on each device (80 layers, 4 of 8 heads of 128): 44 GiB are 288,358 tokens."""
    return RuntimeConfig(
        model="meta-llama/Llama-2-70b-hf",
        dtype="bfloat16",
        max_context_len=4096,
        num_slots=512,
        page_size=32,
        max_step_tokens=2048,
        kv_cache_bytes=44 * 2**30,
        mesh=(("tensor", 2),),
        target="h200:1x1x2",
    )
