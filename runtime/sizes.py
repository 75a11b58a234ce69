"""How large the cache is and how long a context, from the model, the device and what the user asked for."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from ..errors import ConfigError, OutOfMemoryError
from ..models.config import ModelConfig
from ..models.kv_cache import cache_bytes, cache_spec
from ..sharding.rules import Placement
from . import host_memory
from .config import (
    DEFAULT_CONTEXT_LEN,
    DEFAULT_NUM_SLOTS,
    DEFAULT_STEP_TOKENS,
    PLAIN,
    STREAMED_NUM_SLOTS,
    STREAMED_STEP_TOKENS,
    RuntimeConfig,
)
from .slot_state import empty_slots
from .temporaries import step_temporaries

_GPU_RESERVE = 0.02  # of the memory that arrays may take: fragments
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
    is_resident = config.weights == "resident"
    num_slots = config.num_slots or (DEFAULT_NUM_SLOTS if is_resident else STREAMED_NUM_SLOTS)
    if config.num_slots is None and config.max_step_tokens is not None:
        num_slots = min(num_slots, max(config.max_step_tokens // 2, 1))
    num_tokens = DEFAULT_STEP_TOKENS if is_resident else STREAMED_STEP_TOKENS
    return config.replace(
        dtype=dtype.name,
        quantization=config.quantization or PLAIN,
        max_context_len=context_len(config, model),
        num_slots=num_slots,
        max_step_tokens=config.max_step_tokens or max(num_tokens, 2 * num_slots),
        max_decode_steps=config.max_decode_steps if is_resident else 1,
        kv_cache_dtype=config.kv_cache_dtype or dtype.name,
    )


def context_len(config: RuntimeConfig, model: ModelConfig) -> int:
    """The longest prompt and output, in tokens.

    Raises:
      ConfigError: max_context_len is beyond the model's own.
    """
    if config.max_context_len is None:
        # A context past the original one stretches dynamic and longrope frequencies: that is left to be asked for.
        return min(model.max_context_len, model.unstretched_len or model.max_context_len, DEFAULT_CONTEXT_LEN)
    if config.max_context_len > model.max_context_len:
        raise ConfigError(
            f"max_context_len={config.max_context_len} is more than the {model.max_context_len} tokens that the "
            "checkpoint declares. Lower it."
        )
    return config.max_context_len


def weights_budget(config: RuntimeConfig, memory_bytes: int | None) -> int:
    """Bytes of weights on each device where they are not resident: what was asked for, or half of the memory.

    Raises:
      ConfigError: the devices do not say how much memory they have, and weights_memory is not given.
    """
    if config.weights_memory is not None:
        return config.weights_memory
    if memory_bytes is None:
        raise ConfigError("the devices do not report their memory; give weights_memory.")
    return memory_bytes // 2


def check_host_memory(weight_bytes: int) -> None:
    """Raises OutOfMemoryError unless the host can keep all the weights."""
    available = host_memory.available_bytes()
    if weight_bytes > available:
        raise OutOfMemoryError(
            f"weights=host keeps {weight_bytes:,} bytes of weights in the host's memory; {available:,} are there. Use "
            "weights=stream, which reads them from disk."
        )


def size_cache(
    config: RuntimeConfig, model: ModelConfig, placement: Placement, weight_bytes: int, memory_bytes: int | None
) -> CacheSize:
    """Pages for every slot at full length if there is room, else as many as fit.

    `weight_bytes` and `memory_bytes` are of one device; None if it does not say how much memory it has.

    Raises:
      OutOfMemoryError: not even one sequence of full length fits, or more was asked for than there is; says by how
        much and what mends it.
      ConfigError: the device does not say how much memory it has, and kv_cache_bytes is not given.
    """
    assert config.max_context_len is not None and config.kv_cache_dtype is not None and config.num_slots is not None
    page_bytes = bytes_of_page(config, model, placement)
    pages_per_slot = -(-config.max_context_len // config.page_size)
    taken = {
        "the weights": weight_bytes,
        f"num_slots={config.num_slots}": slot_bytes(config.num_slots, model, placement),
        f"max_step_tokens={config.max_step_tokens} (temporaries)": step_temporaries(config, model, placement),
    }
    room = _room(placement, memory_bytes, taken, config.kv_cache_bytes)
    wanted = pages_per_slot * config.num_slots * page_bytes
    num_pages = (config.kv_cache_bytes or min(wanted, room)) // page_bytes
    if placement.on_host and config.kv_cache_bytes is None and room < wanted:
        num_pages = max(_steady(num_pages), min(num_pages, pages_per_slot))
    if num_pages < pages_per_slot:
        longest = num_pages * config.page_size
        to = f" to {longest}" if longest > 1 else ""
        raise OutOfMemoryError(
            f"one sequence of max_context_len={config.max_context_len} tokens needs {pages_per_slot * page_bytes:,} "
            f"bytes of KV cache on each device; {config.kv_cache_bytes or room:,} are there. "
            f"Lower max_context_len{to}, raise kv_cache_bytes, or choose a larger tensor axis."
        )
    return CacheSize(num_pages=num_pages, page_bytes=page_bytes)


def _steady(num_pages: int) -> int:
    """At most an eighth less, so that a little more or less free memory at the next start finds the same programs."""
    shift = max(num_pages.bit_length() - 4, 0)
    return num_pages >> shift << shift


def bytes_of_page(config: RuntimeConfig, model: ModelConfig, placement: Placement) -> int:
    """A page of the KV cache on one device: keys and values of all layers, scales included."""
    page = cache_spec(model, placement, 1, config.page_size, config.kv_cache_dtype or "")
    return cache_bytes(page, placement)


def slot_bytes(num_slots: int, model: ModelConfig, placement: Placement) -> int:
    """What sampling remembers of a data shard's slots, on each of its devices."""
    state = jax.eval_shape(functools.partial(empty_slots, num_slots, model.vocab_size))
    parts = {"counts": placement.num_parts("vocab"), "bias": placement.num_parts("vocab")}
    return sum(a.size * a.dtype.itemsize // parts.get(name, 1) for name, a in state._asdict().items())


def _room(placement: Placement, total: int | None, taken: Mapping[str, int], wanted: int | None) -> int:
    """Bytes of one device for a cache of a size that nobody chose; `taken` is what else there will be, by name.

    Raises:
      OutOfMemoryError: what is taken, or the `wanted` bytes beside it, are more than there is.
    """
    if total is None and wanted is not None:
        return wanted
    if total is None:
        raise ConfigError("the devices do not report their memory; give kv_cache_bytes.")
    if wanted is not None:
        taken = {**taken, "kv_cache_bytes": wanted}
    usable = usable_bytes(placement, total)
    free = usable - sum(taken.values())
    if free < 0:
        parts = ", ".join(f"{name} {size:,}" for name, size in taken.items())
        raise OutOfMemoryError(
            f"each device has {total:,} bytes, {usable:,} of them for use, which do not hold {parts}: "
            f"{-free:,} too many. {_remedy(taken, usable)}"
        )
    return min(int(_CPU_SHARE * total), free) if placement.on_host else free


def usable_bytes(placement: Placement, memory_bytes: int) -> int:
    """What a plan may fill of a device's memory."""
    return memory_bytes if placement.on_host else memory_bytes - int(_GPU_RESERVE * memory_bytes)


def _remedy(taken: Mapping[str, int], usable: int) -> str:
    """What to change, the one that alone takes too much first."""
    weight_bytes = taken["the weights"]
    if weight_bytes >= usable:
        times = weight_bytes // max(usable, 1) + 1
        return (
            f"The weights alone do not fit: choose a tensor axis (or, for experts, an expert axis) {times} times as "
            "large, a smaller dtype, or weights=stream."
        )
    cache = "kv_cache_bytes, " if "kv_cache_bytes" in taken else ""
    return f"Lower {cache}num_slots or max_step_tokens, or choose a larger tensor axis or a smaller dtype."


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that each device of this process may use, None where they do not say; on a CPU all share the host's."""
    device: jax.Device = mesh.local_devices[0]
    if device.platform == "cpu":
        return host_memory.available_bytes() // len(mesh.local_devices)
    limit: int | None = (device.memory_stats() or {}).get("bytes_limit")
    return limit
