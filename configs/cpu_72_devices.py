"""The embedded model on 72 CPU devices: the rack's shape on any machine, to try what needs many devices."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """A replica on each device, as the record was set; the model's axes do not split into 72."""
    return RuntimeConfig(
        model="embedded",
        dtype="float32",
        max_context_len=512,
        num_slots=2,
        max_step_tokens=64,
        kv_cache_bytes=2**24,
        mesh=(("data", 72),),
        target="cpu:72",
    )
