"""Attention of ragged queries over a paged key/value cache, and the write that fills the cache.

The cache is [L, P, 2, K, Z, H]: layer, page, keys (0) and values (1), KV head, place in the page, head dimension;
int8 has scales [L, P, 2, K, Z] beside it (`KvCache`).
Everything here is one shard's: no data-shard axis R, and N and K are the heads of this shard.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ...errors import KernelError
from ..dispatch import Implementation, KernelChoices, anywhere
from ..made_for import made_for
from . import cpu, reference, xla
from .contract import CacheDType, KvCache, PagedAttentionProblem, PagedAttentionSpec, PagedBatch
from .write import write_kv

__all__ = [
    "TABLE",
    "CacheDType",
    "KvCache",
    "PagedAttentionProblem",
    "PagedAttentionSpec",
    "PagedBatch",
    "paged_attention",
    "write_kv",
]

TABLE: tuple[Implementation[PagedAttentionProblem], ...] = (
    made_for("hopper", __name__, "paged_attention"),
    made_for("blackwell", __name__, "paged_attention"),
    Implementation("cpu", cpu.paged_attention, cpu.unsupported),
    Implementation("xla", xla.paged_attention, anywhere),
    Implementation("reference", reference.paged_attention, anywhere),
)


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KvCache[Array],
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
    without keys, are zeros. Nothing that lies beyond a slot's keys, NaN included, reaches the output, be it a value or
    a scale. Of the exact output, on normally distributed keys and values, the error is below 1e-2 of the largest
    number with an int8 cache and 6e-2 with a float8_e4m3fn one; what is computed from the dequantized cache is as
    exact as with any other.
    Raises KernelError if the shapes disagree or the chosen implementation cannot serve.
    """
    _check(q, cache, batch, spec)
    problem = PagedAttentionProblem(
        platform=kernels.platform,
        device_kind=kernels.device_kind,
        spec=spec,
        num_heads=q.shape[1],
        num_kv_heads=cache.values.shape[3],
        head_dim=q.shape[2],
        page_size=cache.values.shape[4],
        dtype=q.dtype.name,
        cache_dtype=cache.values.dtype.name,
        has_sinks=sinks is not None,
    )
    chosen = kernels.choose("paged_attention", TABLE, problem)
    output: jax.Array = chosen.fn(q, cache, jnp.asarray(layer, jnp.int32), batch, spec=spec, sinks=sinks)
    return output


def _check(q: jax.Array, cache: KvCache[Array], batch: PagedBatch, spec: PagedAttentionSpec) -> None:
    shape, dtype = cache.values.shape, cache.values.dtype.name
    if q.ndim != 3 or len(shape) != 6 or shape[2] != 2 or shape[5] != q.shape[2]:
        raise KernelError(f"expected q [T, N, H] and cache [L, P, 2, K, Z, H], got {q.shape} and {shape}")
    if q.shape[1] % shape[3]:
        raise KernelError(f"{q.shape[1]} heads cannot share {shape[3]} KV heads: expected a multiple")
    if dtype not in (*get_args(CacheDType), "uint8"):
        raise KernelError(f"expected a cache of {', '.join(get_args(CacheDType))}, got {dtype}")
    expected = shape[:5] if dtype == "int8" else None
    found = None if cache.scales is None else cache.scales.shape
    if found != expected:
        raise KernelError(f"a cache of {dtype} and shape {shape} has scales of shape {expected}, got {found}")
    num_slots = batch.kv_lens.shape[0]
    if batch.page_tables.shape[:-1] != (num_slots,) or batch.cu_query_lens.shape != (num_slots + 1,):
        raise KernelError(f"expected page tables and cu_query_lens of {num_slots} slots, as many as kv_lens has")
    if spec.one_query_per_slot and q.shape[0] != num_slots:
        raise KernelError(f"one_query_per_slot wants as many rows as slots, got {q.shape[0]} and {num_slots}")
