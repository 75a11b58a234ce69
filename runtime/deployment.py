"""A deployment before anything is loaded: what a config, a model and a mesh come to, from shapes alone.

The runtime, `millrace plan` and `millrace compile` all begin here; the mesh may be of devices that are not there.
"""

import dataclasses

from jax.sharding import Mesh

from ..models.config import ModelConfig
from ..models.decoder import AbstractDecoder
from ..models.kv_cache import cache_spec
from ..models.partition import partition, with_places
from ..pallas_kernels.dispatch import KernelChoices, Platform
from ..sharding.rules import Placement
from .buckets import Bucket, make_buckets
from .config import RuntimeConfig
from .model_source import compute_dtype
from .param_tree import flatten
from .scheduler import SchedulerConfig
from .sizes import resolve, size_cache, weights_budget
from .steps import StepModel
from .weight_streaming import StreamSizes, plan_stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """All that programs and scheduler are made of."""

    config: RuntimeConfig  # complete
    model: StepModel
    buckets: tuple[Bucket, ...]
    sizes: StreamSizes | None  # of weights that are not resident
    weight_bytes: int  # on each device

    @property
    def streams(self) -> bool:
        """Whether weights are read layer by layer while steps run."""
        return self.sizes is not None

    @property
    def scheduler(self) -> SchedulerConfig:
        """The sizes that the scheduler works with."""
        config = self.config
        assert config.max_context_len and config.max_step_tokens and config.num_slots
        return SchedulerConfig(
            num_shards=self.model.placement.num_shards,
            num_slots=config.num_slots,
            num_pages=self.model.cache.values.shape[2],
            page_size=config.page_size,
            max_context_len=config.max_context_len,
            max_step_tokens=config.max_step_tokens,
            max_decode_steps=config.max_decode_steps,
            prefix_caching=config.prefix_caching,
        )


def deploy(config: RuntimeConfig, model_config: ModelConfig, mesh: Mesh, memory_bytes: int | None) -> Deployment:
    """Fill in what the config leaves open, for devices of `memory_bytes` each (None: they do not say).

    Raises:
      ConfigError, KernelError, OutOfMemoryError: what does not fit, and what mends it.
    """
    dtype = compute_dtype(model_config, config.dtype)
    placement = partition(model_config, mesh)
    config = resolve(config, model_config, dtype)
    config = config.replace(mesh=tuple((str(axis), int(size)) for axis, size in mesh.shape.items()))
    decoder = AbstractDecoder(with_places(model_config, mesh), dtype)
    sizes = None
    weight_bytes = device_weight_bytes(decoder, placement)
    if config.weights != "resident":
        sizes = plan_stream(decoder, placement, weights_budget(config, memory_bytes))
        config = config.replace(weights_memory=sizes.num_bytes)
        is_all_on_device = config.weights == "host" and placement.on_host
        weight_bytes = weight_bytes if is_all_on_device else sizes.num_bytes
    cache_size = size_cache(config, model_config, placement, weight_bytes, memory_bytes)
    config = config.replace(kv_cache_bytes=cache_size.num_pages * cache_size.page_bytes)
    model = _step_model(config, decoder, placement, cache_size.num_pages)
    assert config.num_slots and config.max_step_tokens
    return Deployment(
        config=config,
        model=model,
        buckets=make_buckets(config.num_slots, config.max_step_tokens),
        sizes=sizes,
        weight_bytes=weight_bytes,
    )


def device_weight_bytes(decoder: AbstractDecoder, placement: Placement) -> int:
    """Bytes of all weights on each device."""
    return sum(map(placement.shard_bytes, flatten(decoder.specs)[0].values()))


def _step_model(config: RuntimeConfig, decoder: AbstractDecoder, placement: Placement, num_pages: int) -> StepModel:
    assert config.max_context_len and config.kv_cache_dtype and config.num_slots
    return StepModel(
        decoder=decoder,
        placement=placement,
        kernels=KernelChoices(
            platform_of(placement.mesh), dict(config.kernels), device_kind=placement.mesh.devices.flat[0].device_kind
        ),
        cache=cache_spec(decoder.config, placement, num_pages, config.page_size, config.kv_cache_dtype),
        num_slots=config.num_slots,
        pages_per_slot=-(-config.max_context_len // config.page_size),
        max_context_len=config.max_context_len,
        max_decode_steps=config.max_decode_steps,
    )


def platform_of(mesh: Mesh) -> Platform:
    """What a mesh's devices are."""
    return "cpu" if mesh.devices.flat[0].platform == "cpu" else "gpu"
