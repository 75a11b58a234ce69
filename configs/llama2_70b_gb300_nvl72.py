"""Llama 2 70B on the 72 GB300 of one NVL72 rack, 18 hosts of 4: a replica on each, as the record was set."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """Weights are 39.3 GB in nvfp4 (embedding in bfloat16, head in fp8), of the 297 GB of a GB300; a token of KV cache
    in fp8 is 160 KiB: 160 GiB are 1,048,576.

    Other meshes for the same rack, shorter steps for fewer sequences at once: --mesh=data=36,tensor=2,
    --mesh=data=18,tensor=4 (a host is a replica), --mesh=data=9,tensor=8 (as many devices as KV heads).
    """
    return RuntimeConfig(
        model="meta-llama/Llama-2-70b-hf",
        dtype="bfloat16",
        quantization="nvfp4",
        max_context_len=2048,
        num_slots=2048,
        page_size=32,
        max_step_tokens=4096,
        kv_cache_bytes=160 * 2**30,
        kv_cache_dtype="float8_e4m3fn",
        mesh=(("data", 72),),
        target="gb300:1x18x4",
    )
