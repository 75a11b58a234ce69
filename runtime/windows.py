"""Whole windows of a text through the decoder, outside a runtime: a window is the only row of its data shard."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..models.batch import StepBatch
from ..models.decoder import AbstractDecoder
from ..models.kv_cache import PagedAttend, cache_spec
from ..models.step import Step, rope_tables
from ..pallas_kernels.dispatch import KernelChoices
from ..pallas_kernels.paged_attention import KvCache
from ..sharding.rules import Placement

_PAGE_SIZE = 16


def window_batch(tokens: Int[Array, "R T"], pages_per_slot: int) -> StepBatch:
    """The step that computes a window from its beginning, in the first pages."""
    shards, length = tokens.shape
    pages = jnp.arange(pages_per_slot, dtype=jnp.int32)
    return StepBatch(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape),
        rows=jnp.zeros_like(tokens),
        page_tables=jnp.broadcast_to(pages, (shards, 1, pages_per_slot)),
        cu_query_lens=jnp.broadcast_to(jnp.array([0, length], jnp.int32), (shards, 2)),
        kv_lens=jnp.full((shards, 1), length, jnp.int32),
    )


def window_step(decoder: AbstractDecoder, placement: Placement, kernels: KernelChoices, length: int) -> Step:
    """What layers share while they compute one window of any tokens; rope as in a context of that length."""
    batch = window_batch(jnp.zeros((1, length), jnp.int32), -(-length // _PAGE_SIZE))
    return Step(
        placement=placement,
        kernels=kernels,
        attend=PagedAttend(batch, placement, kernels, one_query_per_slot=False),
        ropes=rope_tables(decoder.config, batch.positions, length),
    )


def window_cache(decoder: AbstractDecoder, placement: Placement, length: int) -> KvCache[Array]:
    """An empty cache of the decoder's dtype that holds one window in one layer, layer 0."""
    spec = cache_spec(decoder.config, placement, -(-length // _PAGE_SIZE), _PAGE_SIZE, decoder.dtype)
    shape = (spec.values.shape[0], 1, *spec.values.shape[2:])
    return KvCache(jnp.zeros(shape, spec.values.dtype), None)
