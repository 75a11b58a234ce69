"""What a Hopper paged attention kernel works on: pages as blocks of keys, and the items or tiles that CTAs share.

A unit is what one copy brings, min(page size, 64) keys of one page; a block is 64 keys or a multiple, whole units that
follow each other in a slot. An item is a run of blocks of one slot. A slot's items depend on its own keys and on static
sizes alone, so its answer is the same bits whatever its neighbours are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .contract import KvCache, PagedBatch

BLOCK_KEYS = 64


@dataclasses.dataclass(frozen=True)
class Units:
    """How pages of a size, a divisor or a multiple of 64, make blocks of a multiple of 64."""

    page_size: int
    block_keys: int = BLOCK_KEYS

    @property
    def keys(self) -> int:
        """Keys of one unit."""
        return min(self.page_size, BLOCK_KEYS)

    @property
    def per_block(self) -> int:
        """Units of one block."""
        return self.block_keys // self.keys

    @property
    def per_page(self) -> int:
        """Units of one page."""
        return self.page_size // self.keys


class Place(NamedTuple):
    """How keys lie in pages, and how many of them a query sees (None: all)."""

    units: Units
    window: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a kernel is compiled for."""

    units: Units
    dtype: Any  # of q and of the output
    cache_dtype: Any
    scale: float
    window: int | None
    soft_cap: float | None
    has_sinks: bool
    stages: int
    num_ctas: int
    has_tensor_memory: bool = False  # Blackwell: products by tcgen05

    @property
    def is_widened(self) -> bool:
        """Whether pages are of 8 bits."""
        return bool(jnp.dtype(self.cache_dtype).itemsize == 1)

    @property
    def has_scales(self) -> bool:
        """Whether pages have scales."""
        return bool(self.cache_dtype == jnp.int8)

    @property
    def math_dtype(self) -> Any:
        """Of both products' operands. Only float16 is made of e4m3; beside int8 the softmax's weights, which take the
        scales of values, want the range of bfloat16."""
        if self.has_scales:
            return jnp.dtype(jnp.bfloat16)
        return jnp.dtype(jnp.float16) if self.cache_dtype == jnp.float8_e4m3fn else jnp.dtype(self.dtype)


class Keys(NamedTuple):
    """Where the kernels find keys and values."""

    cache: KvCache[jax.Array]
    layer: jax.Array  # [1] int32
    page_tables: jax.Array  # [B, pages_per_slot]
    kv_lens: jax.Array  # [B]


class Split(NamedTuple):
    """How a slot's blocks become items: at most `most` of them, and at least `min_blocks` in each but the last."""

    most: int
    min_blocks: int


def choose_split(num_slots: int, num_kv_heads: int, max_keys: int, sizes: Mapping[str, int]) -> Split:
    """Many slots fill the chip without splits; few are split so far that they fill it too.

    `sizes` has num_items (what to aim at), max_splits and min_blocks, max_blocks (the bounds of min_blocks).
    """
    blocks = max(sizes["min_blocks"], num_slots * num_kv_heads // 32)
    min_blocks = min(blocks, sizes["max_blocks"])
    most = min(max(sizes["num_items"] // num_slots, 1), sizes["max_splits"])
    return Split(min(most, -(-max_keys // (min_blocks * BLOCK_KEYS))), min_blocks)


def item_of(num_keys: Any, index: Any, place: Place, split: Split) -> tuple[Any, Any, Any]:
    """Item `index` of a slot with one query, at its last key: first unit, end unit; and how many items the slot has.

    Past a slot's last item, and in a slot without keys, the end is not behind the first. Kernels work it out for
    themselves: a list made on the device would be nine small kernels in each layer.
    """
    units, window = place
    end = _ceil_div(num_keys, units.keys)
    first = num_keys * 0 if window is None else lax.div(jnp.maximum(num_keys - window, 0), jnp.int32(units.keys))
    blocks = _ceil_div(end - first, units.per_block)
    item_units = jnp.maximum(_ceil_div(blocks, split.most), split.min_blocks) * units.per_block
    begin = first + index * item_units
    num_items = lax.div(end - first + item_units - 1, item_units)
    return begin, jnp.minimum(begin + item_units, end), num_items


def _ceil_div(x: Any, y: int) -> Any:
    return lax.div(x + (y - 1), jnp.int32(y))


class Tiles(NamedTuple):
    """C tiles of query rows, each of one slot or of the rows behind the last; the first `num_used` are in use."""

    rows: jax.Array  # [C, 6] int32: slot, first row, rows, position of the first row, first unit, end unit
    num_used: jax.Array  # [1] int32
    first_tile: jax.Array  # [B + 1] int32: of each slot, and of the rows behind the last


def make_tiles(batch: PagedBatch, query_lens: jax.Array, num_rows: int, tile_rows: int, place: Place) -> Tiles:
    """The tiles of slots with `query_lens` [B] queries, 0 for those that are left to others, 2 or more for the rest.

    The rows behind the last slot have tiles as well, of no keys. A tile of no keys begins and ends at unit 1: its first
    page, which is read ahead, then is one of the table's.
    """
    units, window = place
    num_slots = query_lens.shape[0]
    query_lens = jnp.append(query_lens, num_rows - batch.cu_query_lens[-1])
    kv_lens = jnp.append(batch.kv_lens, 0)
    num_tiles = -(-query_lens // tile_rows)
    ends = jnp.cumsum(num_tiles)
    most = num_rows // tile_rows + min(num_slots, num_rows // 2) + 1

    tile = jnp.arange(most)
    slot = jnp.minimum(jnp.searchsorted(ends, tile, side="right", method="compare_all"), num_slots)
    offset = (tile - (ends - num_tiles)[slot]) * tile_rows
    rows = jnp.minimum(tile_rows, query_lens[slot] - offset)
    position = (kv_lens - query_lens)[slot] + offset
    first_key = jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)
    begin, end = first_key // units.keys, -(-(position + rows) // units.keys)
    begin, end = (jnp.where(kv_lens[slot] > 0, unit, 1) for unit in (begin, end))
    columns = [jnp.minimum(slot, num_slots - 1), batch.cu_query_lens[slot] + offset, rows, position, begin, end]
    first_tile = (ends - num_tiles).astype(jnp.int32)
    return Tiles(jnp.stack(columns, axis=1).astype(jnp.int32), ends[-1:].astype(jnp.int32), first_tile)
