"""Qwen3 30B-A3B (128 experts, 8 per token) on four H200 of one host, tensor parallel: one KV head per device."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """Weights are 61 GB in bfloat16, 15 GB per device; 4 KV heads divide over 4 devices, and no further."""
    return RuntimeConfig(
        model="Qwen/Qwen3-30B-A3B",
        dtype="bfloat16",
        max_context_len=16384,
        num_slots=256,
        page_size=32,
        max_step_tokens=2048,
        kv_cache_bytes=80 * 2**30,
        mesh=(("tensor", 4),),
        target="h200:1x1x4",
    )
