"""Attention of ragged queries over a paged key/value cache, and the write that fills the cache.

The cache is [L, P, 2, K, Z, H]: layer, page, keys (0) and values (1), KV head, place in the page, head dimension.
Everything here is one shard's: no data-shard axis R, and N and K are the heads of this shard.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ...errors import KernelError
from ..dispatch import Implementation, KernelChoices, anywhere
from . import reference, xla
from .contract import PagedAttentionProblem, PagedAttentionSpec, PagedBatch
from .write import write_kv

__all__ = ["TABLE", "PagedAttentionProblem", "PagedAttentionSpec", "PagedBatch", "paged_attention", "write_kv"]

TABLE: tuple[Implementation[PagedAttentionProblem], ...] = (
    Implementation("xla", xla.paged_attention, anywhere),
    Implementation("reference", reference.paged_attention, anywhere),
)


def paged_attention(
    q: Float[Array, "T N H"],
    cache: Float[Array, "L P 2 K Z H"],
    layer: Int32[Array, ""],
    batch: PagedBatch,
    *,
    spec: PagedAttentionSpec,
    kernels: KernelChoices,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "T N H"]:
    """Softmax attention of every query over its slot's keys at or before it, and within the window.

    Query row t of slot b stands at position kv_lens[b] - (queries of b) + (t - cu_query_lens[b]). The softmax is in
    float32; a sink is one extra logit per head that takes no value. Rows that belong to no slot, and rows of a slot
    without keys, are zeros. Nothing that lies beyond a slot's keys, NaN included, reaches the output.
    Raises KernelError if the shapes disagree or the chosen implementation cannot serve.
    """
    _check(q, cache, batch, spec)
    problem = PagedAttentionProblem(
        platform=kernels.platform,
        spec=spec,
        num_heads=q.shape[1],
        num_kv_heads=cache.shape[3],
        head_dim=q.shape[2],
        page_size=cache.shape[4],
        dtype=q.dtype.name,
        cache_dtype=cache.dtype.name,
        has_sinks=sinks is not None,
    )
    chosen = kernels.choose("paged_attention", TABLE, problem)
    output: jax.Array = chosen.fn(q, cache, jnp.asarray(layer, jnp.int32), batch, spec=spec, sinks=sinks)
    return output


def _check(q: jax.Array, cache: jax.Array, batch: PagedBatch, spec: PagedAttentionSpec) -> None:
    if q.ndim != 3 or cache.ndim != 6 or cache.shape[2] != 2 or cache.shape[5] != q.shape[2]:
        raise KernelError(f"expected q [T, N, H] and cache [L, P, 2, K, Z, H], got {q.shape} and {cache.shape}")
    if q.shape[1] % cache.shape[3]:
        raise KernelError(f"{q.shape[1]} heads cannot share {cache.shape[3]} KV heads: expected a multiple")
    num_slots = batch.kv_lens.shape[0]
    if batch.page_tables.shape[:-1] != (num_slots,) or batch.cu_query_lens.shape != (num_slots + 1,):
        raise KernelError(f"expected page tables and cu_query_lens of {num_slots} slots, as many as kv_lens has")
    if spec.one_query_per_slot and q.shape[0] != num_slots:
        raise KernelError(f"one_query_per_slot wants as many rows as slots, got {q.shape[0]} and {num_slots}")
