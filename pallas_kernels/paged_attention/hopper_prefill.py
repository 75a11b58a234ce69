"""Paged attention of prompt chunks on Hopper.

Schedule: persistent CTAs share units of work (tile, KV head), the last tiles first, for these see the most keys, and
in turns back and forth, so that no CTA gets the longest of each turn: they end together. A tile is up to 64 rows per
consumer warpgroup, a row one head of one query, so that the G heads which share a KV head share its keys. A producer
warpgroup keeps `stages` blocks of 64 keys and values in flight by TMA, page by page, over the ends of units too, and
prepares them: 8-bit blocks are widened (and scaled), values past a slot's last key become zeros. Consumers compute
S = Q K^T, the running softmax in registers (M = 64 rows, 64 keys), O += P V with P from registers; only blocks at the
diagonal or at a window's start are masked. Q comes and the output goes in pieces, heads of one query that are whole
tiled rows of shared memory, so that both lie in device memory as the step has them and a tile stores no row but its
own; where heads make no such piece, both are tiles of their own, which the caller gathers. Rows of no slot, or of one
without keys, are tiles without blocks, which come out as zeros.
The tensor cores bound it, and the exponentials next to them: 64 x 64 of either per block and consumer. So two consumers
take turns: in its own, one adds P V and begins the next block's Q K^T, and while it has its softmax the other has the
tensor cores. Both have the same blocks, so as many turns. A unit's last turn is passed before its output is stored.

Operands under a wgmma: a consumer waits for each product before it uses the result, and arrives at a stage's `free`
barrier only after both its products with it; the producer refills a stage when all consumers have arrived. Q's tile is
loaded anew, or overwritten by the output, only behind a `commit_smem`, a barrier of the consumer that each of its warps
passes after it has waited for its last product. Weights go through shared memory only where there are no operands in
registers: in GPU interpret mode, and with tensor memory, whose `loaded` barrier all warps pass first.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..mosaic import ROWS, TILED_ROWS, swizzled
from .hopper_tiles import (
    LOG2_E,
    MASKED,
    along_columns,
    full,
    line_bytes,
    log2_scores,
    output_tiles,
    product_of,
    read_pages,
    source_keys,
    tensor_memory,
    widened_columns,
)
from .hopper_work import BLOCK_KEYS, Case, Keys, Tiles

ROWS_EACH = 64  # of a consumer warpgroup
SMALLEST = 2.0**-100  # below any sum of weights: where a row has seen no key, nothing is divided by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(Case):
    """What one prefill kernel is compiled for; products by tcgen05 have one consumer, and weights in shared memory."""

    num_groups: int  # G
    consumers: int  # warpgroups
    raw_stages: int  # of 8-bit blocks on their way to being widened
    weights_in_registers: bool
    takes_turns: bool  # two consumers, at the tensor cores

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


def prefill(q: jax.Array, keys: Keys, tiles: Tiles, sinks: jax.Array | None, case: Prefill) -> jax.Array:
    """The output of the tiles' rows, of the shape of q, which is [T, K, G, H] or tiles; the rest is not written."""
    num_kv_heads, head_dim = keys.cache.values.shape[3], q.shape[-1]
    row = np.arange(case.consumers * ROWS_EACH)
    arguments = [q.astype(case.math_dtype), keys.cache.values, *keys[1:], tiles.rows, tiles.num_used]
    arguments.append(jnp.asarray(row // case.num_groups, jnp.int32))
    if keys.cache.scales is not None:
        arguments.append(keys.cache.scales)
    if sinks is not None:
        by_head = (sinks.astype(jnp.float32) * LOG2_E).reshape(num_kv_heads, -1)
        arguments.append(by_head[:, row % case.num_groups])
    num_ctas = min(case.num_ctas, tiles.rows.shape[0] * num_kv_heads)
    kernel = plgpu.kernel(
        functools.partial(_body, case),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=case.consumers + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(case, head_dim),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"paged_prefill_{'blackwell' if case.has_tensor_memory else 'hopper'}",
    )
    output: jax.Array = kernel(*arguments)
    return output


def _scratch(case: Prefill, head_dim: int) -> dict[str, Any]:
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
    if case.dtype != case.math_dtype:
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


def _body(case: Prefill, *refs: Any, **scratch: Any) -> None:
    q, values, layer, page_tables, kv_lens, tiles, count, row_queries, *rest = refs
    scales = rest.pop(0) if case.has_scales else None
    sinks = rest.pop(0) if case.has_sinks else None
    (output,) = rest
    num_kv_heads = values.shape[3]
    warpgroup = lax.axis_index("warpgroup")

    share = _Share(case, num_kv_heads, tiles, count[0] * num_kv_heads, kv_lens)

    @pl.when(warpgroup == case.consumers)
    def _() -> None:
        producer = _Producer(case, values, scales, layer[0], page_tables, scratch)
        share.visit(producer.widen if case.is_widened else producer.copy)

    @pl.when(warpgroup < case.consumers)
    def _() -> None:
        consumer = _Consumer(case, warpgroup, q, row_queries, sinks, output, scratch)
        pl.when(warpgroup != 0)(consumer.pass_turn)  # the first has the first turn
        share.visit(consumer.attend)
        # The last turn that is passed. If it were seen which barrier it is, its place would take a register all along.
        pl.when(lax.optimization_barrier(warpgroup) == 0)(consumer.take_turn)
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Unit:
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
class _Share:
    """The units of this CTA, one in each turn of all CTAs."""

    case: Prefill
    num_kv_heads: int
    tiles: Any  # [C, 6]
    num_units: jax.Array  # of all CTAs
    kv_lens: Any  # [B]

    def visit(self, work: Callable[[jax.Array, _Unit], jax.Array]) -> None:
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

    def unit(self, turn: jax.Array) -> _Unit:
        """The unit of a turn."""
        number = self.num_units - 1 - (turn * lax.axis_size("cta") + self._place(turn))
        tile, head = lax.div(number, self.num_kv_heads), lax.rem(number, self.num_kv_heads)
        slot, position, begin, end = (self.tiles[tile, i] for i in (0, 3, 4, 5))
        return _Unit(self.case, self.tiles, tile, head, slot, position, begin, end, self.kv_lens[slot])


@dataclasses.dataclass(frozen=True)
class _Producer:
    """The warpgroup that brings blocks of keys and values, ready to be multiplied."""

    case: Prefill
    values: Any  # [L, P, 2, K, Z, H]
    scales: Any  # [L, P, 2, K, Z] or None
    layer: jax.Array
    page_tables: Any
    scratch: dict[str, Any]

    def copy(self, num_before: jax.Array, unit: _Unit) -> jax.Array:
        """Blocks as they are; a slot's last one is waited for, so that what lies past its keys can be cleared."""
        here, keys, values = (self.scratch[name] for name in ("here", "keys", "values"))

        def one(i: jax.Array, pages: list[jax.Array]) -> list[jax.Array]:
            following = self._pages(unit, i + 1)
            stage = self._take(num_before + i)
            is_last = unit.first_key + (i + 1) * BLOCK_KEYS > unit.num_keys

            @pl.when(jnp.logical_not(is_last))
            def _() -> None:
                self._fetch(unit, i, pages, (keys.at[stage], values.at[stage], None), here.at[stage])

            @pl.when(is_last)
            def _() -> None:
                tail_here = self.scratch["tail_here"]
                self._fetch(unit, i, pages, (keys.at[stage], values.at[stage], None), tail_here)
                plgpu.barrier_wait(tail_here)
                for start in output_tiles(values.shape[2]):
                    tile = values.at[stage, :, pl.ds(start, 64)]
                    cleared = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
                    tile[...] = self._cleared(cleared, unit, i, plgpu.Layout.WGMMA)
                plgpu.commit_smem()
                for _ in range(2 * self.case.units.per_block):  # as many as the copies would have made
                    plgpu.barrier_arrive(here.at[stage])

            return following

        lax.fori_loop(0, unit.num_blocks, one, self._pages(unit, jnp.int32(0)))
        return num_before + unit.num_blocks

    def widen(self, num_before: jax.Array, unit: _Unit) -> jax.Array:
        """Blocks of 8 bits: copied to a ring of their own, and from there widened into that of the consumers."""
        ring, num_blocks = self.case.raw_stages, unit.num_blocks

        def fetch(i: jax.Array, pages: list[jax.Array]) -> None:
            @pl.when(i < num_blocks)
            def _() -> None:
                stage = lax.rem(num_before + i, ring)
                raw = self.scratch["raw"].at[stage]
                scales = self.scratch["scales"].at[stage] if self.case.has_scales else None
                self._fetch(unit, i, pages, (raw.at[0], raw.at[1], scales), self.scratch["raw_here"].at[stage])

        def one(i: jax.Array, pages: list[jax.Array]) -> list[jax.Array]:
            following = self._pages(unit, i + 1 + ring)
            raw_stage, stage = lax.rem(num_before + i, ring), self._take(num_before + i)
            plgpu.barrier_wait(self.scratch["raw_here"].at[raw_stage])
            for which in (0, 1):
                self._widen(unit, i, which, raw_stage, stage)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.scratch["here"].at[stage])
            fetch(i + ring, pages)
            return following

        for i in range(ring):
            fetch(jnp.int32(i), self._pages(unit, jnp.int32(i)))
        lax.fori_loop(0, num_blocks, one, self._pages(unit, jnp.int32(ring)))
        return num_before + num_blocks

    def _take(self, count: jax.Array) -> jax.Array:
        """The stage of a block, when its consumers have left it."""
        stage = lax.rem(count, self.case.stages)

        @pl.when(count >= self.case.stages)
        def _() -> None:
            plgpu.barrier_wait(self.scratch["free"].at[stage])

        return stage

    def _pages(self, unit: _Unit, i: jax.Array) -> list[jax.Array]:
        """The pages of block i, read a block ahead, for the copies would wait."""
        units = self.case.units
        return read_pages(self.page_tables, unit.slot, unit.begin + i * units.per_block, unit.end, units)

    def _fetch(self, unit: _Unit, i: jax.Array, pages: list[jax.Array], block: tuple[Any, Any, Any], here: Any) -> None:
        """Start copying block i to (keys, values, scales)."""
        units = self.case.units
        sources = source_keys(unit.begin + i * units.per_block, unit.end, units)
        for j, (page, source) in enumerate(zip(pages, sources, strict=True)):
            target = pl.ds(j * units.keys, units.keys)
            for which in (0, 1):
                place = (self.layer, page, which, unit.head, source)
                plgpu.copy_gmem_to_smem(self.values.at[place], block[which].at[target], here)
                if block[2] is not None:
                    plgpu.copy_gmem_to_smem(self.scales.at[place], block[2].at[which, target], here)

    def _widen(self, unit: _Unit, i: jax.Array, which: int, raw_stage: jax.Array, stage: jax.Array) -> None:
        layout = plgpu.Layout.WGMMA_UPCAST_2X
        for columns in widened_columns(self.scratch["raw"].shape[3]):
            raw = plgpu.load(self.scratch["raw"].at[raw_stage, which, :, columns], layout=layout, optimized=False)
            wide = raw.astype(self.case.math_dtype)
            if self.case.has_scales:
                rows = self.scratch["scales"].at[raw_stage, which]
                scales = plgpu.load(rows, layout=layout.reduce(1), optimized=False).astype(wide.dtype)
                wide = wide * along_columns(scales, wide.shape)
            if which:
                wide = self._cleared(wide, unit, i, layout)
            self.scratch["values" if which else "keys"].at[stage, :, columns][...] = wide

    def _cleared(self, values: jax.Array, unit: _Unit, i: jax.Array, layout: Any) -> jax.Array:
        """Zeros past the slot's last key: a weight of 0 does not hide a NaN."""
        position = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + unit.first_key + i * BLOCK_KEYS
        return jnp.where(position < unit.num_keys, values, jnp.zeros((), values.dtype))


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """A warpgroup that attends 64 rows of each tile."""

    case: Prefill
    index: jax.Array
    q: Any  # [T, K, G, H], or [C, K, consumers * 64, H]
    row_queries: Any  # [consumers * 64]: which of the tile's queries a row belongs to
    sinks: Any  # [K, consumers * 64] or None
    output: Any  # as q
    scratch: dict[str, Any]

    @property
    def rows(self) -> Any:
        """Its rows of a tile."""
        return pl.ds(self.index * ROWS_EACH, ROWS_EACH)

    def attend(self, num_before: jax.Array, unit: _Unit) -> jax.Array:
        """One tile and KV head."""
        q_tile, staged = self.scratch["q_tile"].at[self.index], self._staged
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        q_here = self.scratch["q_here"].at[self.index]

        @pl.loop(0, ROWS_EACH // self.case.piece_rows)
        def _(piece: jax.Array) -> None:
            plgpu.copy_gmem_to_smem(self._piece(unit, self.q, piece), q_tile.at[self._piece_rows(piece)], q_here)

        plgpu.barrier_wait(q_here)

        zeros = full((ROWS_EACH, q_tile.shape[1]), 0.0, plgpu.Layout.WGMMA)
        self.take_turn()
        carry: Any = (full((ROWS_EACH,), MASKED, ROWS), full((ROWS_EACH,), 0.0, ROWS), zeros)
        first, end = unit.unmasked
        if self.case.window is not None:
            carry = lax.fori_loop(0, first, functools.partial(self._block, num_before, unit, True), carry)
        carry = lax.fori_loop(first, end, functools.partial(self._block, num_before, unit, False), carry)
        visit = functools.partial(self._block, num_before, unit, True)
        peak, total, mixed = lax.fori_loop(end, unit.num_blocks, visit, carry)
        self.pass_turn()

        if self.sinks is not None:
            sink = plgpu.load(self.sinks.at[unit.head, self.rows], layout=ROWS, optimized=False)
            top = jnp.maximum(peak, sink)
            mixed = mixed * along_columns(jnp.exp2(peak - top), mixed.shape)
            total = total * jnp.exp2(peak - top) + jnp.exp2(sink - top)
        plgpu.commit_smem()  # all warps are done with q's tile, which is where most of the outputs go
        total = jnp.maximum(total, SMALLEST)
        staged[...] = (mixed / along_columns(total, mixed.shape)).astype(staged.dtype)
        plgpu.commit_smem()
        self._store(unit)
        return num_before + unit.num_blocks

    def _piece_rows(self, piece: jax.Array) -> Any:
        """Which of the 64 rows a piece is."""
        return pl.ds(piece * self.case.piece_rows, self.case.piece_rows)

    def _piece(self, unit: _Unit, array: Any, piece: jax.Array) -> Any:
        """A piece's part of q or the output; of what is behind q's last row, any."""
        if self.case.is_tiled:
            return array.at[unit.tile, unit.head, self.rows]
        row = self.index * ROWS_EACH + piece * self.case.piece_rows
        query, group = lax.div(row, self.case.num_groups), lax.rem(row, self.case.num_groups)
        query = jnp.minimum(unit.row + query, array.shape[0] - 1)
        return array.at[query, unit.head, pl.ds(group, self.case.piece_rows)]

    def _store(self, unit: _Unit) -> None:
        """Copy the tile's own pieces of what is staged to the output."""
        num_rows = unit.num_queries * self.case.num_groups - self.index * ROWS_EACH
        whole = ROWS_EACH // self.case.piece_rows
        num_pieces = 1 if self.case.is_tiled else jnp.clip(lax.div(num_rows, self.case.piece_rows), 0, whole)

        @pl.loop(0, num_pieces)
        def _(piece: jax.Array) -> None:
            plgpu.copy_smem_to_gmem(self._staged.at[self._piece_rows(piece)], self._piece(unit, self.output, piece))

    def take_turn(self) -> None:
        """Wait for the tensor cores."""
        if self.case.takes_turns:
            plgpu.barrier_wait(self.scratch["turn"].at[self.index])

    def pass_turn(self) -> None:
        """Leave the tensor cores to the other consumer, behind the products that have begun."""
        if self.case.takes_turns:
            plgpu.barrier_arrive(self.scratch["turn"].at[1 - self.index])

    @property
    def _staged(self) -> Any:
        return self.scratch.get("staged", self.scratch["q_tile"]).at[self.index]

    def _block(self, num_before: jax.Array, unit: _Unit, is_masked: bool, i: jax.Array, carry: Any) -> Any:
        """Join block i in the consumer's turn."""
        peak, total, mixed = carry
        stage = lax.rem(num_before + i, self.case.stages)
        keys, shape = self.scratch["keys"].at[stage], (ROWS_EACH, BLOCK_KEYS)
        plgpu.barrier_wait(self.scratch["here"].at[stage])
        scores = product_of(self.scratch)(
            shape, self.scratch["q_tile"].at[self.index], keys.transpose((1, 0)), self.pass_turn
        )
        scores, factor = self._log2_scores(scores)
        if is_masked:
            scores = self._masked(scores, unit.first_key + i * BLOCK_KEYS, unit.position)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1) * factor)
        weights = jnp.exp2(scores * factor - along_columns(new_peak, shape))
        decay = jnp.exp2(peak - new_peak)
        total = total * decay + jnp.sum(weights, axis=1)
        mixed = mixed * along_columns(decay, mixed.shape)
        weights = weights.astype(self.case.math_dtype)
        total, mixed, weights = lax.optimization_barrier((total, mixed, weights))
        self.take_turn()
        mixed = self._add(mixed, weights, self.scratch["values"].at[stage])
        plgpu.barrier_arrive(self.scratch["free"].at[stage])
        return new_peak, total, mixed

    def _log2_scores(self, products: jax.Array) -> tuple[jax.Array, float]:
        """Scores, and what makes them powers of two: the peak is found first, and scaled, so that scores never are."""
        if self.case.soft_cap is None and self.case.scale > 0:
            return products, self.case.scale * LOG2_E
        return log2_scores(products, self.case.scale, self.case.soft_cap), 1.0

    def _masked(self, scores: jax.Array, first_key: jax.Array, position: jax.Array) -> jax.Array:
        """Scores [64, keys] of the keys from `first_key` that the rows of a tile at `position` see."""
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + first_key
        position = plgpu.load(self.row_queries.at[self.rows], layout=ROWS, optimized=False) + position
        last = along_columns(position, scores.shape)
        is_visible = key <= last
        if self.case.window is not None:
            is_visible &= key > last - self.case.window
        return jnp.where(is_visible, scores, MASKED)

    def _add(self, mixed: jax.Array, weights: jax.Array, values: Any) -> jax.Array:
        """mixed + weights @ values, waited for."""
        if self.case.weights_in_registers:
            added: jax.Array = pl.run_state(lambda sums: plgpu.wgmma(sums, weights, values))(
                plgpu.WGMMAAccumulatorRef.init(mixed)
            )
            return added
        tile = self.scratch["weights"].at[self.index]
        tile[...] = weights
        plgpu.commit_smem()
        return mixed + product_of(self.scratch)(mixed.shape, tile, values)
