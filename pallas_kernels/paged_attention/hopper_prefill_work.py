"""What the prefill kernel is compiled for, and what its CTAs share: units of a tile of query rows and a KV head."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..mosaic import TILED_ROWS
from .hopper_work import BLOCK_KEYS, Case

ROWS_EACH = 64  # of a consumer warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(Case):
    """What one prefill kernel is compiled for; products by tcgen05 have one consumer, and weights in shared memory."""

    num_groups: int  # G
    consumers: int  # warpgroups
    raw_stages: int  # of 8-bit blocks on their way to being widened
    weights_in_registers: bool
    is_overlapped: bool  # a block's scores are multiplied together with the values before it

    @property
    def registers(self) -> tuple[int, int] | None:
        """Those of a thread of the producer and of a consumer; None: all of a CTA have as many, 168 where it has three
        warpgroups, of which products of 64 rows x 128 keys and their weights would spill some."""
        return (96, 200) if self.consumers == 2 and self.units.block_keys > BLOCK_KEYS else None

    @property
    def tile_queries(self) -> int:
        """Queries of a tile; rows that are left over belong to nobody."""
        return self.consumers * ROWS_EACH // self.num_groups

    @property
    def is_tiled(self) -> bool:
        """Whether q and the output are tiles [C, K, consumers * 64, H]; [T, K, G, H] if a query is whole tiled rows."""
        return self.num_groups % TILED_ROWS != 0

    @property
    def piece_rows(self) -> int:
        """Rows of a consumer that one copy brings or stores: of one query if it is not `is_tiled`."""
        return ROWS_EACH if self.is_tiled else math.gcd(self.num_groups, ROWS_EACH)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A tile of one slot's query rows, or of nobody's, and a KV head."""

    case: Prefill
    tiles: Any  # [C, 6]
    tile: jax.Array
    head: jax.Array
    slot: jax.Array
    position: jax.Array  # of the first query
    begin: jax.Array  # units of keys
    end: jax.Array
    num_keys: jax.Array  # of the slot

    @property
    def row(self) -> jax.Array:
        """The tile's first query; read where it is asked, for registers are few."""
        return self._read(1)

    @property
    def num_queries(self) -> jax.Array:
        """How many the tile has."""
        return self._read(2)

    def _read(self, column: int) -> jax.Array:
        number: jax.Array = self.tiles[self.tile, column]
        return number

    @property
    def num_blocks(self) -> jax.Array:
        """Blocks of keys that the tile sees any of."""
        return lax.div(self.end - self.begin + self.case.units.per_block - 1, self.case.units.per_block)

    @property
    def first_key(self) -> jax.Array:
        """Position of the first block's first key."""
        return self.begin * self.case.units.keys

    def key_of(self, block: jax.Array) -> jax.Array:
        """Position of a block's first key."""
        return self.first_key + block * self.case.units.block_keys

    @property
    def unmasked(self) -> tuple[jax.Array, jax.Array]:
        """The blocks of which every row sees every key: first, end."""
        first, block_keys = jnp.int32(0), self.case.units.block_keys
        if self.case.window is not None:
            hidden = self.position + self.case.tile_queries - self.case.window - self.first_key
            first = jnp.clip(lax.div(hidden + block_keys - 1, block_keys), 0, self.num_blocks)
        end = lax.div(self.position + 1 - self.first_key, block_keys)
        return first, jnp.clip(end, first, self.num_blocks)


@dataclasses.dataclass(frozen=True)
class Share:
    """The units of this CTA, one in each turn of all CTAs."""

    case: Prefill
    num_kv_heads: int
    tiles: Any  # [C, 6]
    num_units: jax.Array  # of all CTAs
    kv_lens: Any  # [B]

    def visit(self, work: Callable[[jax.Array, Unit], jax.Array]) -> None:
        """work(num_before, unit) for each unit; `num_before` sums the blocks of those before it."""

        def one(turn: jax.Array, num_before: jax.Array) -> jax.Array:
            return work(num_before, self.unit(turn))

        lax.fori_loop(0, self.num_turns, one, jnp.int32(0))

    @property
    def num_turns(self) -> jax.Array:
        """Those in which there is a unit for this CTA."""
        whole, rest = (op(self.num_units, lax.axis_size("cta")) for op in (lax.div, lax.rem))
        return whole + (self._place(whole) < rest).astype(jnp.int32)

    def _place(self, turn: jax.Array) -> jax.Array:
        """This CTA's place in a turn: one turn begins where the one before it ended."""
        cta = lax.axis_index("cta")
        return jnp.where(lax.rem(turn, 2) == 0, cta, lax.axis_size("cta") - 1 - cta)

    def unit(self, turn: jax.Array) -> Unit:
        """The unit of a turn."""
        number = self.num_units - 1 - (turn * lax.axis_size("cta") + self._place(turn))
        tile, head = lax.div(number, self.num_kv_heads), lax.rem(number, self.num_kv_heads)
        slot, position, begin, end = (self.tiles[tile, i] for i in (0, 3, 4, 5))
        return Unit(self.case, self.tiles, tile, head, slot, position, begin, end, self.kv_lens[slot])
