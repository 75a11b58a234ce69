"""Paged attention in plain XLA, for the CPU and as the portable answer elsewhere.

Schedule: tiles of query rows that share a slot, several tiles at once. For a batch of tiles one loop runs over blocks
of keys, from the first page that a window lets in to the last key of the longest tile; each turn gathers one block of
pages per tile straight from [layer, page], so cost follows the real lengths and no layer or slot is ever gathered
whole. The softmax is the running one (Milakov and Gimelshein 2018, FlashAttention). A step of one query per slot is
one batch of B tiles of one row; in a mixed step such slots still go that way, and the others are cut into tiles of
16 to 64 rows, in a loop that ends with the last tile in use. On the CPU memory traffic bounds it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .contract import PagedAttentionSpec, PagedBatch

MIN_TILE_ROWS, MAX_TILE_ROWS = 16, 64
TILES_AT_ONCE = 4
KEYS_AT_ONCE = 1024  # keys in one turn of the loop, over all tiles of the batch
MIN_BLOCK_KEYS, MAX_BLOCK_KEYS = 64, 512

_MASKED = -1e30  # finite, so that a row which has seen no key yet makes no NaN


class _Tiles(NamedTuple):
    """C tiles of M rows: [C, M, N, H], the rows' positions [C, M] (-1: no row), their slots' page tables [C, Pmax]."""

    q: jax.Array
    positions: jax.Array
    page_tables: jax.Array


def paged_attention(
    q: jax.Array,
    cache: jax.Array,
    layer: jax.Array,
    batch: PagedBatch,
    *,
    spec: PagedAttentionSpec,
    sinks: jax.Array | None,
) -> jax.Array:
    """See the contract."""
    num_rows = q.shape[0]
    query_lens = jnp.diff(batch.cu_query_lens)
    single = query_lens == 1
    singles = _Tiles(
        q=q[:, None] if spec.one_query_per_slot else q[batch.cu_query_lens[:-1], None],
        positions=jnp.where(single, batch.kv_lens - 1, -1)[:, None],
        page_tables=batch.page_tables,
    )
    attended = _attend(singles, cache, layer, spec, sinks)[:, 0]
    if spec.one_query_per_slot:
        return attended
    output = _attend_tiles(q, cache, layer, batch, jnp.where(single, 0, query_lens), spec, sinks)
    rows = jnp.where(single, batch.cu_query_lens[:-1], num_rows)
    return output.at[rows].set(attended, mode="drop")


def _attend_tiles(
    q: jax.Array, cache: jax.Array, layer: jax.Array, batch: PagedBatch, query_lens: jax.Array,
    spec: PagedAttentionSpec, sinks: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The rows of the slots with query_lens > 0, zeros in all others."""
    num_rows = q.shape[0]
    tile_rows = min(max(num_rows // 8, MIN_TILE_ROWS), MAX_TILE_ROWS)
    last_tile = jnp.cumsum((query_lens + tile_rows - 1) // tile_rows)  # of each slot, exclusive
    slots = jnp.arange(query_lens.shape[0])
    first_row, end_row = batch.cu_query_lens[:-1], batch.cu_query_lens[1:]

    def attend_some(turn: jax.Array, output: jax.Array) -> jax.Array:
        tile = turn * TILES_AT_ONCE + jnp.arange(TILES_AT_ONCE)
        slot = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), slots[-1])
        from_last = last_tile[slot] - tile  # 1 for the last tile of its slot; not positive beyond the last slot's
        num_tiles = (query_lens[slot] + tile_rows - 1) // tile_rows
        rows = (first_row[slot] + (num_tiles - from_last) * tile_rows)[:, None] + jnp.arange(tile_rows)
        used = rows < end_row[slot][:, None]
        positions = (batch.kv_lens - end_row)[slot][:, None] + rows
        tiles = _Tiles(q[rows], jnp.where(used, positions, -1), batch.page_tables[slot])
        attended = _attend(tiles, cache, layer, spec, sinks)
        return output.at[jnp.where(used, rows, num_rows)].set(attended, mode="drop")

    num_turns = (last_tile[-1] + TILES_AT_ONCE - 1) // TILES_AT_ONCE
    return jax.lax.fori_loop(0, num_turns, attend_some, jnp.zeros_like(q))


def _attend(
    tiles: _Tiles, cache: jax.Array, layer: jax.Array, spec: PagedAttentionSpec, sinks: jax.Array | None
) -> jax.Array:
    """The running softmax over blocks of keys, [C, M, N, H]."""
    num_tiles, tile_rows, num_heads, head_dim = tiles.q.shape
    num_kv_heads, page_size = cache.shape[3:5]
    dtype = tiles.q.dtype if cache.dtype.itemsize <= tiles.q.dtype.itemsize else cache.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    q = tiles.q.astype(dtype).reshape(num_tiles, tile_rows, num_kv_heads, -1, head_dim)
    q = jnp.moveaxis(q, 1, 2)  # [C, K, M, G, H]

    block_keys = min(max(KEYS_AT_ONCE // num_tiles, MIN_BLOCK_KEYS), MAX_BLOCK_KEYS)
    block_pages = min(max(block_keys // page_size, 1), tiles.page_tables.shape[1])
    block_keys = block_pages * page_size
    first_key, end_key = _visible_range(tiles.positions, spec.window)
    first_page = first_key // page_size
    heads = jnp.arange(num_kv_heads)[:, None]

    def gather(pages: jax.Array, which: int) -> jax.Array:
        block = cache.at[layer, pages[:, None], which, heads].get(mode="clip")  # [C, K, pages, Z, H]
        return block.reshape(num_tiles, num_kv_heads, block_keys, head_dim).astype(dtype)

    def attend_block(turn: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = state
        page = first_page[:, None] + turn * block_pages + jnp.arange(block_pages)
        pages = jnp.take_along_axis(tiles.page_tables, page, axis=1, mode="clip")
        key = (page[:, :, None] * page_size + jnp.arange(page_size)).reshape(num_tiles, block_keys)
        visible = key[:, None] <= tiles.positions[:, :, None]
        if spec.window is not None:
            visible &= key[:, None] > tiles.positions[:, :, None] - spec.window
        scores = jnp.einsum(
            "ckmgh,cksh->ckmgs", q, gather(pages, 0), precision=precision, preferred_element_type=jnp.float32
        )
        scores *= spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        scores = jnp.where(visible[:, None, :, None], scores, _MASKED)
        # Weight 0 does not hide a NaN: what no row of the tile sees is read as 0.
        seen = (key >= first_key[:, None]) & (key < end_key[:, None])
        values = jnp.where(seen[:, None, :, None], gather(pages, 1), 0)

        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        decay = jnp.exp(top - new_top)
        added = jnp.einsum(
            "ckmgs,cksh->ckmgh", weights.astype(dtype), values, precision=precision, preferred_element_type=jnp.float32
        )
        return new_top, total * decay + weights.sum(-1), mixed * decay[..., None] + added

    shape = q.shape[:-1]
    top, total = jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is not None:
        top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(num_kv_heads, 1, -1), shape)
        total = jnp.ones(shape, jnp.float32)
    num_turns = jnp.max((end_key - first_page * page_size + block_keys - 1) // block_keys)
    state = (top, total, jnp.zeros(q.shape, jnp.float32))
    top, total, mixed = jax.lax.fori_loop(0, num_turns, attend_block, state)
    output = jnp.moveaxis(mixed / jnp.where(total == 0, 1, total)[..., None], 2, 1).reshape(tiles.q.shape)
    return jnp.where((tiles.positions >= 0)[..., None, None], output, 0).astype(tiles.q.dtype)


def _visible_range(positions: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first key that any row of each tile sees, and the end of those it sees, [C] each; 0 and 0 if it has no row."""
    end = jnp.max(positions, axis=1) + 1
    if window is None:
        return jnp.zeros_like(end), end
    first = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1) - (window - 1)
    return jnp.where(end > 0, jnp.maximum(first, 0), 0), end
