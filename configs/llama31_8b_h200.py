"""Llama 3.1 8B Instruct on one H200 (141 GB): bfloat16 weights are 16 GB, so the cache can have most of the rest."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """A token of KV cache is 128 KiB (32 layers, 8 heads of 128, keys and values): 96 GiB are 786,432 tokens."""
    return RuntimeConfig(
        model="meta-llama/Llama-3.1-8B-Instruct",
        dtype="bfloat16",
        max_context_len=8192,
        num_slots=256,
        page_size=32,
        max_step_tokens=2048,
        kv_cache_bytes=96 * 2**30,
        target="h200",
    )
