"""Qwen3 235B-A22B (128 experts, 8 per token) on the 72 GB300 of one NVL72 rack, its experts spread over all."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """128 experts take 144 places, two on each device; attention is replicated, 13 GB. Each device has its own slots.

    With --mesh=data=9,expert=8 eight devices hold all experts, 57 GB each, and tokens cross fewer links.
    """
    return RuntimeConfig(
        model="Qwen/Qwen3-235B-A22B",
        dtype="bfloat16",
        max_context_len=8192,
        num_slots=512,
        page_size=32,
        max_step_tokens=2048,
        kv_cache_bytes=192 * 2**30,
        mesh=(("expert", 72),),
        target="gb300:1x18x4",
    )
