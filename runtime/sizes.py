"""How large the cache is and how long a context, from the model, the device and what the user asked for."""

import dataclasses
import os

import jax
import numpy as np

from ..errors import ConfigError, OutOfMemoryError
from ..models.config import ModelConfig
from ..models.kv_cache import num_cache_heads
from ..sharding.rules import Placement
from .config import DEFAULT_CONTEXT_LEN, DEFAULT_STEP_TOKENS, RuntimeConfig

_GPU_HEADROOM = 0.9  # of the memory that the device reports; the rest is for temporaries
_CPU_SHARE = 0.25  # of the memory that is available: other programs live on the machine too


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Pages of one data shard, and what they cost each device."""

    num_pages: int
    page_bytes: int  # on one device


def resolve(config: RuntimeConfig, model: ModelConfig, dtype: np.dtype) -> RuntimeConfig:
    """The config with everything but kv_cache_bytes and the mesh filled in.

    Raises:
      ConfigError: max_context_len is beyond the model's own.
    """
    if config.max_context_len is not None and config.max_context_len > model.max_context_len:
        raise ConfigError(
            f"max_context_len={config.max_context_len} is more than the {model.max_context_len} tokens that the "
            "checkpoint declares. Lower it."
        )
    return config.replace(
        dtype=dtype.name,
        max_context_len=config.max_context_len or _default_context_len(model),
        max_step_tokens=config.max_step_tokens or max(DEFAULT_STEP_TOKENS, 2 * config.num_slots),
        kv_cache_dtype=config.kv_cache_dtype or dtype.name,
    )


def _default_context_len(model: ModelConfig) -> int:
    """A context past the original one stretches dynamic and longrope frequencies, so that is left to be asked for."""
    return min(model.max_context_len, model.unstretched_len or model.max_context_len, DEFAULT_CONTEXT_LEN)


def size_cache(config: RuntimeConfig, model: ModelConfig, placement: Placement, weight_bytes: int) -> CacheSize:
    """Pages for every slot at full length if there is room, else as many as fit; `weight_bytes` is of one device.

    Raises:
      OutOfMemoryError: not even one sequence of full length fits; says by how much and what mends it.
    """
    assert config.max_context_len is not None and config.kv_cache_dtype is not None
    heads = num_cache_heads(model, placement) // placement.size("tensor")
    itemsize = 4 if config.kv_cache_dtype == "float32" else 2
    page_bytes = 2 * model.num_layers * heads * config.page_size * model.head_dim * itemsize
    pages_per_slot = -(-config.max_context_len // config.page_size)
    wanted = pages_per_slot * config.num_slots * page_bytes
    budget = config.kv_cache_bytes or min(wanted, _free_bytes(placement, weight_bytes))
    num_pages = min(budget, wanted) // page_bytes if config.kv_cache_bytes is None else budget // page_bytes
    if num_pages < pages_per_slot:
        raise OutOfMemoryError(
            f"one sequence of max_context_len={config.max_context_len} tokens needs {pages_per_slot * page_bytes:,} "
            f"bytes of KV cache on each device; {budget:,} are there. Lower max_context_len to "
            f"{num_pages * config.page_size}, raise kv_cache_bytes, or choose a larger tensor axis."
        )
    return CacheSize(num_pages=int(num_pages), page_bytes=page_bytes)


def _free_bytes(placement: Placement, weight_bytes: int) -> int:
    device: jax.Device = placement.mesh.devices.flat[0]
    if device.platform == "cpu":
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(_CPU_SHARE * available) // placement.mesh.size
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError(f"{device} does not report its memory; give kv_cache_bytes.")
    free = int(_GPU_HEADROOM * stats["bytes_limit"]) - weight_bytes
    if free <= 0:
        raise OutOfMemoryError(
            f"the weights take {weight_bytes:,} bytes of each device, which has {stats['bytes_limit']:,}. Choose a "
            "larger tensor axis or a smaller dtype."
        )
    return free
