"""Paged attention in plain XLA: the fast one on a CPU, and the portable one elsewhere.

Schedule: tiles of query rows that share a slot, several tiles at once. For those one loop runs over blocks of keys,
from the first page that a window lets in to the last key of the longest tile; each turn gathers one block of pages
per tile, from [layer, page] of the whole cache, so cost follows the real lengths and no layer and no slot is ever
gathered whole. The softmax is the running one (Milakov and Gimelshein 2018; FlashAttention). A step of one query per
slot is B tiles of one row, all at once. In a mixed step the slots of one query still go that way, and the others
are cut into tiles of 16 to 32 rows, in a loop that ends with the last tile in use.
The scales of an int8 block multiply the scores and the weights, so that the block itself is only widened.
On the CPU gathering the keys bounds the first (memory), the two dots and the exponentials the second.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .contract import KvCache, PagedAttentionSpec, PagedBatch
from .reference import widened

MIN_TILE_ROWS, MAX_TILE_ROWS = 16, 32
TILES_AT_ONCE = 4
KEYS_AT_ONCE = 512  # in one turn of the loop, over all tiles
MIN_BLOCK_KEYS, MAX_BLOCK_KEYS = 64, 512  # of one tile

_MASKED = -1e30  # finite, so that a row that has seen no key yet makes no NaN


class _Tiles(NamedTuple):
    """C tiles of M query rows, each of one slot."""

    q: jax.Array  # [C, M, N, H]
    positions: jax.Array  # [C, M], negative where there is no query
    page_tables: jax.Array  # [C, pages_per_slot]


class _Softmax(NamedTuple):
    """A softmax and its weighted sum of values under way, float32."""

    top: jax.Array  # [C, K, M, G], the greatest score so far
    total: jax.Array  # [C, K, M, G], the sum of exp(score - top)
    mixed: jax.Array  # [C, K, M, G, H], the sum of exp(score - top) * value


def paged_attention(
    q: jax.Array,
    cache: KvCache[jax.Array],
    layer: jax.Array,
    batch: PagedBatch,
    *,
    spec: PagedAttentionSpec,
    sinks: jax.Array | None,
) -> jax.Array:
    """See the contract."""
    if spec.one_query_per_slot:
        tiles = _Tiles(q[:, None], batch.kv_lens[:, None] - 1, batch.page_tables)
        return _attend(tiles, cache, layer, spec, sinks)[:, 0]
    query_lens = jnp.diff(batch.cu_query_lens)
    single = query_lens == 1
    output = _attend_tiles(q, cache, layer, batch, jnp.where(single, 0, query_lens), spec, sinks)
    rows = batch.cu_query_lens[:-1]
    positions = jnp.where(single, batch.kv_lens - 1, -1)
    singles = _Tiles(q.at[rows].get(mode="clip")[:, None], positions[:, None], batch.page_tables)
    attended = _attend(singles, cache, layer, spec, sinks)[:, 0]
    return output.at[jnp.where(single, rows, q.shape[0])].set(attended, mode="drop")


def _attend_tiles(
    q: jax.Array, cache: KvCache[jax.Array], layer: jax.Array, batch: PagedBatch, query_lens: jax.Array,
    spec: PagedAttentionSpec, sinks: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The rows of the slots with query_lens > 0, zeros in all others."""
    num_rows, num_slots = q.shape[0], query_lens.shape[0]
    tile_rows = min(max(num_rows // 8, MIN_TILE_ROWS), MAX_TILE_ROWS)
    num_tiles = (query_lens + tile_rows - 1) // tile_rows  # of each slot
    tile_ends = jnp.cumsum(num_tiles)
    first_rows = batch.cu_query_lens[:-1]

    def attend_some(turn: jax.Array, output: jax.Array) -> jax.Array:
        tile = turn * TILES_AT_ONCE + jnp.arange(TILES_AT_ONCE)
        slot = jnp.minimum(jnp.searchsorted(tile_ends, tile, side="right", method="compare_all"), num_slots - 1)
        index = tile - (tile_ends - num_tiles)[slot]  # within the slot; past its end beyond the last tile in use
        offsets = index[:, None] * tile_rows + jnp.arange(tile_rows)
        used = offsets < query_lens[slot, None]
        positions = (batch.kv_lens - query_lens)[slot, None] + offsets
        rows = first_rows[slot, None] + offsets
        tiles = _Tiles(q.at[rows].get(mode="clip"), jnp.where(used, positions, -1), batch.page_tables[slot])
        attended = _attend(tiles, cache, layer, spec, sinks)
        return output.at[jnp.where(used, rows, num_rows)].set(attended, mode="drop")

    num_turns = (tile_ends[-1] + TILES_AT_ONCE - 1) // TILES_AT_ONCE
    output: jax.Array = jax.lax.fori_loop(0, num_turns, attend_some, jnp.zeros_like(q))
    return output


def _attend(
    tiles: _Tiles, cache: KvCache[jax.Array], layer: jax.Array, spec: PagedAttentionSpec, sinks: jax.Array | None
) -> jax.Array:
    """Every row of the tiles over the keys it sees, [C, M, N, H]; zeros where there is no query, or no key."""
    num_tiles, num_rows, _, head_dim = tiles.q.shape
    num_kv_heads, page_size = cache.values.shape[3:5]
    # The narrower of the two is widened; bfloat16 and float16 hold all of float8_e4m3fn's and int8's numbers.
    dtype = max(tiles.q.dtype, cache.values.dtype, key=lambda d: d.itemsize)
    q = tiles.q.astype(dtype).reshape(num_tiles, num_rows, num_kv_heads, -1, head_dim)
    q = jnp.moveaxis(q, 1, 2)  # [C, K, M, G, H]

    block_keys = min(max(KEYS_AT_ONCE // num_tiles, MIN_BLOCK_KEYS), MAX_BLOCK_KEYS)
    block_pages = min(max(block_keys // page_size, 1), tiles.page_tables.shape[1])
    first_key, end_key = _visible_range(tiles.positions, spec.window)
    first_page = first_key // page_size

    def attend_block(turn: jax.Array, state: _Softmax) -> _Softmax:
        page = first_page[:, None] + turn * block_pages + jnp.arange(block_pages)
        key = (page[:, :, None] * page_size + jnp.arange(page_size)).reshape(num_tiles, -1)  # positions [C, S]
        pages = jnp.take_along_axis(tiles.page_tables, page, axis=1, mode="clip")
        keys, values = (widened(_gather(cache.values, layer, pages, which), dtype) for which in (0, 1))
        scores = spec.scale * _dot("ckmgh,cksh->ckmgs", q, keys)
        # A weight of 0 does not hide a NaN, so what lies beyond the tile's keys is read as 0.
        is_key = (key < end_key[:, None])[:, None, :]
        values = jnp.where(is_key[..., None], values, 0)
        value_scales = None
        if cache.scales is not None:
            key_scales, value_scales = (_gather(cache.scales, layer, pages, which) for which in (0, 1))
            scores = scores * key_scales[:, :, None, None]
            value_scales = jnp.where(is_key, value_scales, 0)
        return _add_block(state, _masked(scores, tiles.positions, key, spec), values, value_scales)

    num_turns = jnp.max((end_key - first_page * page_size + block_pages * page_size - 1) // (block_pages * page_size))
    state = jax.lax.fori_loop(0, num_turns, attend_block, _empty_softmax(q, sinks))
    output = state.mixed / jnp.where(state.total == 0, 1, state.total)[..., None]
    output = jnp.moveaxis(output, 2, 1).reshape(tiles.q.shape)
    return jnp.where((tiles.positions >= 0)[..., None, None], output, 0).astype(tiles.q.dtype)


def _visible_range(positions: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first key that any row of a tile sees and the end of those it sees, [C] each; (0, 0) if it has no row."""
    end = jnp.maximum(jnp.max(positions, axis=1) + 1, 0)
    if window is None:
        return jnp.zeros_like(end), end
    first = jnp.min(jnp.where(positions >= 0, positions, end[:, None]), axis=1) - (window - 1)
    return jnp.clip(first, 0, end), end


def _gather(array: jax.Array, layer: jax.Array, pages: jax.Array, which: int) -> jax.Array:
    """What an array [L, P, 2, K, Z, ...] has of the keys (0) or values (1) of pages [C, b] of one layer,
    [C, K, b * Z, ...].
    """
    num_tiles, num_kv_heads = pages.shape[0], array.shape[3]
    heads = jnp.arange(num_kv_heads)[:, None]  # as indices, not a slice, so that the result needs no transpose
    block = array.at[layer, pages[:, None], which, heads].get(mode="clip")
    return block.reshape(num_tiles, num_kv_heads, -1, *array.shape[5:])


def _masked(scores: jax.Array, positions: jax.Array, key: jax.Array, spec: PagedAttentionSpec) -> jax.Array:
    """Scores [C, K, M, G, S] of queries at `positions` [C, M] and keys at `key` [C, S], capped and masked."""
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    visible = key[:, None] <= positions[:, :, None]
    if spec.window is not None:
        visible &= key[:, None] > positions[:, :, None] - spec.window
    return jnp.where(visible[:, None, :, None], scores, _MASKED)


def _empty_softmax(q: jax.Array, sinks: jax.Array | None) -> _Softmax:
    """No key seen yet; a sink is a score whose value is zero."""
    shape = q.shape[:-1]
    mixed = jnp.zeros(q.shape, jnp.float32)
    if sinks is None:
        return _Softmax(jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), mixed)
    top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(shape[1], 1, shape[3]), shape)
    return _Softmax(top, jnp.ones(shape, jnp.float32), mixed)


def _add_block(state: _Softmax, scores: jax.Array, values: jax.Array, value_scales: jax.Array | None) -> _Softmax:
    """The softmax with S more keys, values [C, K, S, H] standing for value * scale [C, K, S].

    What a row sums before its first visible key decays to exactly 0 at that key.
    """
    top = jnp.maximum(state.top, scores.max(-1))
    weights = jnp.exp(scores - top[..., None])
    decay = jnp.exp(state.top - top)
    total = state.total * decay + weights.sum(-1)
    if value_scales is not None:
        weights = weights * value_scales[:, :, None, None]
    mixed = _dot("ckmgs,cksh->ckmgh", weights.astype(values.dtype), values)
    return _Softmax(top, total, state.mixed * decay[..., None] + mixed)


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum accumulated in float32; HIGHEST keeps a GPU from rounding float32 to TF32."""
    return jnp.einsum(subscripts, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
