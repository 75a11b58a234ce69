"""The paged KV cache: one array for all layers, with one of scales where it is int8, updated in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..pallas_kernels.dispatch import KernelChoices
from ..pallas_kernels.paged_attention import KvCache, PagedAttentionSpec, PagedBatch, paged_attention, write_kv
from ..sharding.axes import Axes
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec
from .batch import BATCH_AXES, StepBatch
from .config import AttentionSpec, ModelConfig

_CACHE_AXES: Axes = ("shard", "layers", "pages", None, "cache_heads", "page", "head_dim")
_SCALE = jnp.dtype(jnp.float32)  # of one head of one token, where the cache has scales


def num_cache_heads(config: ModelConfig, placement: Placement) -> int:
    """KV heads as the cache holds them: repeated where there are fewer than tensor shards."""
    return max(config.num_kv_heads, placement.num_parts("cache_heads"))


def cache_spec(
    config: ModelConfig, placement: Placement, num_pages: int, page_size: int, dtype: DTypeLike
) -> KvCache[ParamSpec]:
    """Values [R, L, P, 2, K, Z, H] and scales [R, L, P, 2, K, Z]: `num_pages` pages for each data shard."""
    heads = num_cache_heads(config, placement)
    shape = (placement.num_shards, config.num_layers, num_pages, 2, heads, page_size, config.head_dim)
    stored = jnp.uint8 if placement.on_host and jnp.dtype(dtype) == jnp.float8_e4m3fn else dtype
    values = ParamSpec(shape, jnp.dtype(stored), _CACHE_AXES)
    return KvCache(values, ParamSpec(shape[:-1], _SCALE, _CACHE_AXES[:-1]) if _has_scales(dtype) else None)


def cache_bytes(cache: KvCache[ParamSpec], placement: Placement) -> int:
    """Bytes of a cache on each device."""
    return sum(placement.shard_bytes(spec) for spec in cache if spec is not None)


def cached_head_bytes(head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of the key, or the value, that one head has of one token."""
    return head_dim * jnp.dtype(dtype).itemsize + (_SCALE.itemsize if _has_scales(dtype) else 0)


def _has_scales(dtype: DTypeLike) -> bool:
    return bool(jnp.dtype(dtype) == jnp.int8)


@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """Writes a step's keys and values into their pages, then attends over them: each shard on its own."""

    batch: StepBatch
    placement: Placement
    kernels: KernelChoices
    one_query_per_slot: bool

    def __call__(
        self, q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"],
        cache: KvCache[Array] | None, layer: jax.Array, spec: AttentionSpec, sinks: Float[Array, " N"] | None,
    ) -> tuple[Float[Array, "R T N H"], KvCache[Array] | None]:  # fmt: skip
        assert cache is not None
        repeats = cache.values.shape[4] // k.shape[2]
        if repeats > 1:
            k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        heads: Axes = ("shard", "tokens", "heads", "head_dim")
        kv: Axes = ("shard", "tokens", "cache_heads", "head_dim")
        cache_axes = KvCache(_CACHE_AXES, None if cache.scales is None else _CACHE_AXES[:-1])
        in_axes = [heads, kv, kv, cache_axes, (), BATCH_AXES, None if sinks is None else ("heads",)]
        run = self.placement.map_shards(functools.partial(self._local, spec), in_axes, [heads, cache_axes])
        out, cache = run(q, k, v, cache, layer, self.batch, sinks)
        return out, cache

    def _local(
        self, spec: AttentionSpec, q: Array, k: Array, v: Array, cache: KvCache[Array], layer: Array,
        batch: StepBatch, sinks: Array | None,
    ) -> tuple[Array, KvCache[Array]]:  # fmt: skip
        # Every array but layer and sinks arrives with R = 1: this device's own data shard.
        cache = jax.tree.map(lambda array: array[0], cache)
        page_tables, positions, rows = batch.page_tables[0], batch.positions[0], batch.rows[0]
        num_pages, page_size = cache.values.shape[1], cache.values.shape[4]
        is_padding = rows >= page_tables.shape[0]
        pages = jnp.where(is_padding, num_pages, page_tables.at[rows, positions // page_size].get(mode="clip"))
        cache = write_kv(cache, layer, k[0], v[0], pages, positions % page_size)
        attention = PagedAttentionSpec(
            scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap, one_query_per_slot=self.one_query_per_slot
        )
        paged = PagedBatch(page_tables, batch.cu_query_lens[0], batch.kv_lens[0])
        out = paged_attention(q[0], cache, layer, paged, spec=attention, kernels=self.kernels, sinks=sinks)
        return out[None], jax.tree.map(lambda array: _in_order(array[None]), cache)


def _in_order(array: Array) -> Array:
    """Left to choose, the compiler moves the axis of a single KV head, and copies the cache on its way in and out."""
    ordered: Array = with_layout_constraint(array, Layout(tuple(range(array.ndim))))
    return ordered
