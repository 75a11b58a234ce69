"""What a Hopper prefill kernel is compiled for, its shared memory, and the units of work that its CTAs share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ..mosaic import TILED_ROWS, swizzled
from .hopper_tiles import line_bytes, tensor_memory
from .hopper_work import BLOCK_KEYS, Case

ROWS_EACH = 64  # of a consumer warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(Case):
    """What one prefill kernel is compiled for; products by tcgen05 have one consumer, and weights in shared memory."""

    num_groups: int  # G
    consumers: int  # warpgroups
    raw_stages: int  # of 8-bit blocks on their way to being widened
    weights_in_registers: bool
    takes_turns: bool  # two consumers, at the tensor cores
    is_pipelined: bool  # weights wait for the next block's scores: the two products run together
    is_ahead: bool  # the next unit's q comes while this one's last block is joined

    @property
    def tile_queries(self) -> int:
        """Queries of a tile; rows that are left over belong to nobody."""
        return self.consumers * ROWS_EACH // self.num_groups

    @property
    def is_tiled(self) -> bool:
        """Whether q and the output are tiles [C, K, consumers * 64, H]; [T, K, G, H] if a query is whole tiled rows."""
        return self.num_groups % TILED_ROWS != 0

    @property
    def is_staged(self) -> bool:
        """Whether the output has a place of its own in shared memory, not q's."""
        return self.is_ahead or bool(self.dtype != self.math_dtype)

    @property
    def piece_rows(self) -> int:
        """Rows of a consumer that one copy brings or stores: of one query if it is not `is_tiled`."""
        return ROWS_EACH if self.is_tiled else math.gcd(self.num_groups, ROWS_EACH)


def scratch_types(case: Prefill, head_dim: int) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    line = line_bytes(head_dim * case.math_dtype.itemsize)
    # Products of 64 rows by tcgen05 take the columns in halves, and a swizzle may not reach past its half.
    narrow = min(line_bytes(head_dim // 2 * case.math_dtype.itemsize), BLOCK_KEYS // 2 * case.math_dtype.itemsize)
    block = (BLOCK_KEYS, head_dim)
    blocks = swizzled((case.stages, *block), case.math_dtype, narrow if case.has_tensor_memory else line)
    num_copies = case.units.per_block * (4 if case.has_scales else 2)
    scratch = {
        "q_tile": swizzled((case.consumers, ROWS_EACH, head_dim), case.math_dtype, line),
        "keys": blocks,  # not one array of both: what `run_state` multiplies may have no constant index
        "values": blocks,
        "q_here": plgpu.Barrier(num_arrivals=ROWS_EACH // case.piece_rows, num_barriers=case.consumers),
        "here": plgpu.Barrier(num_arrivals=1 if case.is_widened else num_copies, num_barriers=case.stages),
        "free": plgpu.Barrier(num_arrivals=case.consumers, num_barriers=case.stages),
    }
    if case.takes_turns:
        scratch["turn"] = plgpu.Barrier(num_barriers=case.consumers)
    if case.is_staged:
        scratch["staged"] = swizzled((case.consumers, ROWS_EACH, head_dim), case.dtype, line)
    if not case.weights_in_registers:
        scratch["weights"] = swizzled((case.consumers, ROWS_EACH, BLOCK_KEYS), case.math_dtype, line)
    if case.is_widened:
        raw_line = line_bytes(head_dim)
        raw = (case.raw_stages, 2, *block)
        scratch["raw"] = swizzled(raw, case.cache_dtype, raw_line) if raw_line else plgpu.SMEM(raw, case.cache_dtype)
        scratch["raw_here"] = plgpu.Barrier(num_arrivals=num_copies, num_barriers=case.raw_stages)
    else:
        scratch["tail_here"] = plgpu.Barrier(num_arrivals=num_copies)
    if case.has_scales:
        scratch["scales"] = plgpu.SMEM((case.raw_stages, 2, BLOCK_KEYS), jnp.float32)
    return scratch | tensor_memory(BLOCK_KEYS, head_dim) if case.has_tensor_memory else scratch


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

    @property
    def unmasked(self) -> tuple[jax.Array, jax.Array]:
        """The blocks of which every row sees every key: first, end."""
        first = jnp.int32(0)
        if self.case.window is not None:
            hidden = self.position + self.case.tile_queries - self.case.window - self.first_key
            first = jnp.clip(lax.div(hidden + BLOCK_KEYS - 1, BLOCK_KEYS), 0, self.num_blocks)
        end = lax.div(self.position + 1 - self.first_key, BLOCK_KEYS)
        return first, jnp.clip(end, first, self.num_blocks)


@dataclasses.dataclass(frozen=True)
class Share:
    """The units of this CTA, one in each turn of all CTAs."""

    case: Prefill
    num_kv_heads: int
    tiles: Any  # [C, 6]
    num_units: jax.Array  # of all CTAs
    kv_lens: Any  # [B]

    def visit(self, work: Callable[[jax.Array, Unit, Unit], jax.Array]) -> None:
        """work(num_before, unit, following) for each unit; `num_before` sums the blocks of those before it.

        The last is followed by itself.
        """
        num_turns = self.num_turns

        def one(turn: jax.Array, num_before: jax.Array) -> jax.Array:
            return work(num_before, self.unit(turn), self.unit(jnp.minimum(turn + 1, num_turns - 1)))

        lax.fori_loop(0, num_turns, one, jnp.int32(0))

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
