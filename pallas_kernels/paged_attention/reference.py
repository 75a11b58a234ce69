"""The definition of paged attention: gather every key of every row's slot, mask, take the softmax."""

import jax
import jax.numpy as jnp

from .contract import KvCache, PagedAttentionSpec, PagedBatch


def paged_attention(
    q: jax.Array,
    cache: KvCache[jax.Array],
    layer: jax.Array,
    batch: PagedBatch,
    *,
    spec: PagedAttentionSpec,
    sinks: jax.Array | None,
) -> jax.Array:
    """See the contract; memory is T times the keys of the longest page table."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = cache.values.shape[3]
    slot, position = _row_places(batch, num_rows, spec)
    pages = _dequantized(cache, layer, batch.page_tables[slot])
    keys, values = jnp.moveaxis(pages, 2, 0)  # each [T, pages_per_slot, K, Z, H]
    keys, values = (jnp.swapaxes(x, 1, 2).reshape(num_rows, num_kv_heads, -1, head_dim) for x in (keys, values))

    key_position = jnp.arange(keys.shape[2])
    visible = key_position <= position[:, None]  # [T, S]; no key is visible at position -1
    if spec.window is not None:
        visible &= key_position > position[:, None] - spec.window
    grouped = q.astype(jnp.float32).reshape(num_rows, num_kv_heads, -1, head_dim)
    scores = spec.scale * jnp.einsum("tkgh,tksh->tkgs", grouped, keys, precision="highest")
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)

    top = scores.max(-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1)
    top = jnp.where(jnp.isfinite(top), top, 0.0) if sink is None else jnp.maximum(top, sink)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + (0.0 if sink is None else jnp.exp(sink - top))
    values = jnp.where(visible[:, None, :, None], values, 0.0)  # 0 * NaN is NaN
    mixed = jnp.einsum("tkgs,tksh->tkgh", weights, values, precision="highest")
    output = mixed / jnp.where(total == 0.0, 1.0, total)
    return output.reshape(num_rows, num_heads, head_dim).astype(q.dtype)


def _dequantized(cache: KvCache[jax.Array], layer: jax.Array, pages: jax.Array) -> jax.Array:
    """These pages of one layer in float32, [*pages, 2, K, Z, H]."""
    values = widened(cache.values.at[layer, pages].get(mode="clip"), jnp.dtype("float32"))
    if cache.scales is None:
        return values
    return values * cache.scales.at[layer, pages].get(mode="clip")[..., None]


def widened(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What a part of the cache's values holds, in another dtype."""
    if values.dtype == jnp.uint8:
        values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    return values.astype(dtype)


def _row_places(batch: PagedBatch, num_rows: int, spec: PagedAttentionSpec) -> tuple[jax.Array, jax.Array]:
    """Slot and position of every query row, [T] each; the position of a row that belongs to no slot is -1."""
    rows = jnp.arange(num_rows)
    if spec.one_query_per_slot:
        return rows, batch.kv_lens - 1
    cu = batch.cu_query_lens
    slot = jnp.minimum(jnp.searchsorted(cu, rows, side="right") - 1, batch.kv_lens.shape[0] - 1)
    position = batch.kv_lens[slot] - (cu[slot + 1] - rows)
    return slot, jnp.where(rows < cu[-1], position, -1)
