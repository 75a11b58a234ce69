"""The paged KV cache: one array for all layers, updated in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..pallas_kernels.dispatch import KernelChoices
from ..pallas_kernels.paged_attention import PagedAttentionSpec, PagedBatch, paged_attention, write_kv
from ..sharding.axes import Axes
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec
from .batch import BATCH_AXES, StepBatch
from .config import AttentionSpec, ModelConfig

CACHE_AXES: Axes = ("shard", "layers", "pages", None, "cache_heads", "page", "head_dim")


def num_cache_heads(config: ModelConfig, placement: Placement) -> int:
    """KV heads as the cache holds them: repeated where there are fewer than tensor shards."""
    return max(config.num_kv_heads, placement.num_parts("cache_heads"))


def cache_spec(
    config: ModelConfig, placement: Placement, num_pages: int, page_size: int, dtype: DTypeLike
) -> ParamSpec:
    """[R, L, P, 2, K, Z, H]: `num_pages` pages of `page_size` tokens for each data shard."""
    heads = num_cache_heads(config, placement)
    shape = (placement.num_shards, config.num_layers, num_pages, 2, heads, page_size, config.head_dim)
    return ParamSpec(shape, jnp.dtype(dtype), CACHE_AXES)


@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """Writes a step's keys and values into their pages, then attends over them: each shard on its own."""

    batch: StepBatch
    placement: Placement
    kernels: KernelChoices
    one_query_per_slot: bool

    def __call__(
        self, q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"], cache: Array | None,
        layer: jax.Array, spec: AttentionSpec, sinks: Float[Array, " N"] | None,
    ) -> tuple[Float[Array, "R T N H"], Array | None]:  # fmt: skip
        assert cache is not None
        repeats = cache.shape[4] // k.shape[2]
        if repeats > 1:
            k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        heads: Axes = ("shard", "tokens", "heads", "head_dim")
        kv: Axes = ("shard", "tokens", "cache_heads", "head_dim")
        in_axes = [heads, kv, kv, CACHE_AXES, (), BATCH_AXES, None if sinks is None else ("heads",)]
        run = self.placement.map_shards(functools.partial(self._local, spec), in_axes, [heads, CACHE_AXES])
        out, cache = run(q, k, v, cache, layer, self.batch, sinks)
        return out, cache

    def _local(
        self, spec: AttentionSpec, q: Array, k: Array, v: Array, cache: Array, layer: Array, batch: StepBatch,
        sinks: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        # Every array but layer and sinks arrives with R = 1: this device's own data shard.
        cache = cache[0]
        page_tables, positions, rows = batch.page_tables[0], batch.positions[0], batch.rows[0]
        num_pages, page_size = cache.shape[1], cache.shape[4]
        is_padding = rows >= page_tables.shape[0]
        pages = jnp.where(is_padding, num_pages, page_tables.at[rows, positions // page_size].get(mode="clip"))
        cache = write_kv(cache, layer, k[0], v[0], pages, positions % page_size)
        attention = PagedAttentionSpec(
            scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap, one_query_per_slot=self.one_query_per_slot
        )
        paged = PagedBatch(page_tables, batch.cu_query_lens[0], batch.kv_lens[0])
        out = paged_attention(q[0], cache, layer, paged, spec=attention, kernels=self.kernels, sinks=sinks)
        # Left to choose, the compiler moves the axis of a single KV head, and copies the cache on its way in and out.
        return out[None], with_layout_constraint(cache[None], Layout(tuple(range(cache.ndim + 1))))
