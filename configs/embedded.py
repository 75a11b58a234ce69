"""The embedded model on a CPU, one process: the smallest footprint that still batches."""

from ..runtime.config import RuntimeConfig


def get_config() -> RuntimeConfig:
    """Float32, because a CPU without bfloat16 units is slower in it; eight slots are a small machine's share."""
    return RuntimeConfig(model="embedded", dtype="float32", num_slots=8, max_step_tokens=256, target="cpu")
