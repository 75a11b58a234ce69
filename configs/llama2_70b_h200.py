"""Llama 2 70B on one H200 (141 GB), weights and KV cache in fp8: as MLPerf's entries for this chip serve it."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """Weights are 69.5 GB; a token of KV cache is 160 KiB (80 layers, 8 heads of 128): 44 GiB are 288,358 tokens."""
    return RuntimeConfig(
        model="meta-llama/Llama-2-70b-hf",
        dtype="bfloat16",
        quantization="fp8",
        max_context_len=4096,
        num_slots=768,
        page_size=32,
        max_step_tokens=2048,
        kv_cache_bytes=44 * 2**30,
        kv_cache_dtype="float8_e4m3fn",
        target="h200",
    )
