"""Puts a runtime together: model, mesh, sizes, programs, weights, step loop."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np

from ..errors import ConfigError
from ..models.decoder import AbstractDecoder
from ..models.kv_cache import cache_spec
from ..models.partition import partition
from ..pallas_kernels.dispatch import KernelChoices, Platform
from ..sharding.mesh import make_mesh
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec
from .buckets import make_buckets
from .config import DEFAULT_CACHE_DIR, RuntimeConfig
from .executor import Executor
from .model_source import ModelSource, compute_dtype, open_model
from .programs import StepModel, compile_programs
from .request import RequestLimits
from .scheduler import Scheduler, SchedulerConfig
from .sizes import resolve, size_cache
from .weights import load_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What stands behind a Runtime, ready to be driven by a step loop."""

    config: RuntimeConfig  # complete
    source: ModelSource
    limits: RequestLimits
    scheduler: Scheduler
    executor: Executor


def assemble(config: RuntimeConfig) -> Engine:
    """Everything that a Runtime does before its first request.

    Raises:
      ConfigError, CheckpointError, KernelError, OutOfMemoryError: what is wrong and what mends it.
    """
    source = open_model(config.model, config.revision)
    dtype = compute_dtype(source.config, config.dtype)
    config = resolve(config, source.config, dtype)
    assert config.max_context_len and config.max_step_tokens
    keep_programs(config.compile_cache_dir)
    placement = partition(source.config, make_mesh(dict(config.mesh or ())))
    config = config.replace(mesh=tuple((str(axis), int(size)) for axis, size in placement.mesh.shape.items()))
    decoder = AbstractDecoder(source.config, dtype)
    size = size_cache(config, source.config, placement, _device_bytes(decoder, placement))
    config = config.replace(kv_cache_bytes=size.num_pages * size.page_bytes)
    assert config.max_context_len and config.max_step_tokens and config.kv_cache_dtype
    model = StepModel(
        decoder=decoder,
        placement=placement,
        kernels=KernelChoices(_platform(placement), dict(config.kernels)),
        cache=cache_spec(source.config, placement, size.num_pages, config.page_size, config.kv_cache_dtype),
        num_slots=config.num_slots,
        pages_per_slot=-(-config.max_context_len // config.page_size),
        max_context_len=config.max_context_len,
        max_decode_steps=config.max_decode_steps,
    )
    buckets = make_buckets(config.num_slots, config.max_step_tokens)
    params = load_params(source.weights, source.config, decoder.specs, placement, show_progress=config.progress)
    programs = compile_programs(model, buckets, show_progress=config.progress)
    executor = Executor(model, buckets, programs, params)
    scheduler = Scheduler(
        SchedulerConfig(
            num_shards=placement.num_shards,
            num_slots=config.num_slots,
            num_pages=size.num_pages,
            page_size=config.page_size,
            max_context_len=config.max_context_len,
            max_step_tokens=config.max_step_tokens,
            max_decode_steps=config.max_decode_steps,
            prefix_caching=config.prefix_caching,
        )
    )
    limits = RequestLimits(
        vocab_size=source.config.vocab_size,
        max_context_len=config.max_context_len,
        eos_ids=source.eos_ids,
        tokenizer=source.tokenizer,
    )
    return Engine(config=config, source=source, limits=limits, scheduler=scheduler, executor=executor)


def keep_programs(directory: str | None) -> None:
    """Turn on JAX's persistent cache, for programs of any size; "" leaves it as it is."""
    if directory == "":
        return
    path = Path(directory) if directory is not None else DEFAULT_CACHE_DIR
    try:
        path.expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f'compile_cache_dir {path} cannot be made ({error}). Choose another, or "" to keep no programs.'
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path.expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _platform(placement: Placement) -> Platform:
    platform = placement.mesh.devices.flat[0].platform
    return "cpu" if platform == "cpu" else "gpu"


def _device_bytes(decoder: AbstractDecoder, placement: Placement) -> int:
    """Bytes of weights on each device."""
    specs = jax.tree.leaves(decoder.specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    return sum(
        math.prod(placement.sharding(spec.axes).shard_shape(spec.shape)) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )
