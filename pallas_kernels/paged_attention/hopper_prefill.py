"""Paged attention of prompt chunks on Hopper.

Schedule: persistent CTAs share units of work (tile, KV head), the last tiles first, for these see the most keys, and in
turns back and forth, so that no CTA gets the longest of each turn: they end together. A tile is up to 64 rows per
consumer warpgroup, a row one head of one query, so that the G heads which share a KV head share its keys. A producer
warpgroup keeps `stages` blocks of 64 or 128 keys and values in flight by TMA, page by page, over the ends of units too,
and prepares them: 8-bit blocks are widened, values past a slot's last key become zeros. Consumers compute S = Q K^T,
the running softmax in registers (M = 64 rows), O += P V with P from registers (scales of an int8 cache are of S and P,
in float32); only blocks at the diagonal or at a window's start are masked. If the kernel `is_overlapped`, S of a block
and P V of the block before it are in flight together, and waited for at once. Q comes and the output goes in pieces,
heads of one query that are whole tiled rows of shared memory, so that both lie in device memory as the step has them
and a tile stores no row but its own; where heads make no such piece, both are tiles of their own, which the caller
gathers. Rows of no slot, or of one without keys, are tiles without blocks, which come out as zeros.
The tensor cores bound it, and the exponentials next to them: 64 x 64 of either per 64 keys and consumer; with blocks of
64 shared memory as well, from which S alone asks all that it gives. Two consumers fill each other's gaps as they come:
taking turns at the tensor cores, by barriers, was 2 to 4 % slower on an H200.

Operands under a wgmma: a consumer waits for each product, and for all that is in flight, before it uses a result or its
weights change, and arrives at a stage's `free` barrier only after both its products with it; the producer refills a
stage when all consumers have arrived. Q's tile is loaded anew, or overwritten by the output, only behind a
`commit_smem`, a barrier of the consumer that each of its warps passes after it has waited for its last product. Weights
go through shared memory only where there are no operands in registers: in GPU interpret mode, and with tensor memory,
whose `loaded` barrier all warps pass first.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..mosaic import BY_COLUMN, BY_ROW, swizzled
from .hopper_prefill_work import ROWS_EACH, Prefill, Share, Unit
from .hopper_tiles import (
    LOG2_E,
    MASKED,
    along_columns,
    along_rows,
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
from .hopper_work import Keys, Tiles

SMALLEST = 2.0**-100  # below any sum of weights: where a row has seen no key, nothing is divided by it


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
    line, block = line_bytes(head_dim * case.math_dtype.itemsize), (case.units.block_keys, head_dim)
    # Products of 64 rows by tcgen05 take the columns in halves, and a swizzle may not reach past its half.
    narrow = min(line_bytes(columns // 2 * case.math_dtype.itemsize) for columns in block)
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
    if case.dtype != case.math_dtype:
        scratch["staged"] = swizzled((case.consumers, ROWS_EACH, head_dim), case.dtype, line)
    if not case.weights_in_registers:
        scratch["weights"] = swizzled((case.consumers, ROWS_EACH, case.units.block_keys), case.math_dtype, line)
    if case.is_widened:
        raw_line = line_bytes(head_dim)
        raw = (case.raw_stages, 2, *block)
        scratch["raw"] = swizzled(raw, case.cache_dtype, raw_line) if raw_line else plgpu.SMEM(raw, case.cache_dtype)
        scratch["raw_here"] = plgpu.Barrier(num_arrivals=num_copies, num_barriers=case.raw_stages)
    else:
        scratch["tail_here"] = plgpu.Barrier(num_arrivals=num_copies)
    if case.has_scales:
        scratch["raw_scales"] = plgpu.SMEM((case.raw_stages, 2, case.units.block_keys), jnp.float32)
        scratch["scales"] = plgpu.SMEM((case.stages, 2, case.units.block_keys), jnp.float32)
    return scratch | tensor_memory(case.units.block_keys, head_dim) if case.has_tensor_memory else scratch


def _body(case: Prefill, *refs: Any, **scratch: Any) -> None:
    q, values, layer, page_tables, kv_lens, tiles, count, row_queries, *rest = refs
    scales = rest.pop(0) if case.has_scales else None
    sinks = rest.pop(0) if case.has_sinks else None
    (output,) = rest
    num_kv_heads = values.shape[3]
    warpgroup = lax.axis_index("warpgroup")

    share = Share(case, num_kv_heads, tiles, count[0] * num_kv_heads, kv_lens)

    @pl.when(warpgroup == case.consumers)
    def _() -> None:
        if case.registers is not None:
            plgpu.set_max_registers(case.registers[0], action="decrease")
        producer = _Producer(case, values, scales, layer[0], page_tables, scratch)
        share.visit(producer.widen if case.is_widened else producer.copy)

    @pl.when(warpgroup < case.consumers)
    def _() -> None:
        if case.registers is not None:
            plgpu.set_max_registers(case.registers[1], action="increase")
        consumer = _Consumer(case, warpgroup, q, row_queries, sinks, output, scratch)
        share.visit(consumer.attend)
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """The warpgroup that brings blocks of keys and values, ready to be multiplied."""

    case: Prefill
    values: Any  # [L, P, 2, K, Z, H]
    scales: Any  # [L, P, 2, K, Z] or None
    layer: jax.Array
    page_tables: Any
    scratch: dict[str, Any]

    def copy(self, num_before: jax.Array, unit: Unit) -> jax.Array:
        """Blocks as they are; a slot's last one is waited for, so that what lies past its keys can be cleared."""
        here, keys, values = (self.scratch[name] for name in ("here", "keys", "values"))

        def one(i: jax.Array, pages: list[jax.Array]) -> list[jax.Array]:
            following = self._pages(unit, i + 1)
            stage = self._take(num_before + i)
            is_last = unit.key_of(i + 1) > unit.num_keys

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

    def widen(self, num_before: jax.Array, unit: Unit) -> jax.Array:
        """Blocks of 8 bits: copied to a ring of their own, and from there widened into that of the consumers."""
        ring, num_blocks = self.case.raw_stages, unit.num_blocks

        def fetch(i: jax.Array, pages: list[jax.Array]) -> None:
            @pl.when(i < num_blocks)
            def _() -> None:
                stage = lax.rem(num_before + i, ring)
                raw = self.scratch["raw"].at[stage]
                scales = self.scratch["raw_scales"].at[stage] if self.case.has_scales else None
                self._fetch(unit, i, pages, (raw.at[0], raw.at[1], scales), self.scratch["raw_here"].at[stage])

        def one(i: jax.Array, pages: list[jax.Array]) -> list[jax.Array]:
            following = self._pages(unit, i + 1 + ring)
            raw_stage, stage = lax.rem(num_before + i, ring), self._take(num_before + i)
            plgpu.barrier_wait(self.scratch["raw_here"].at[raw_stage])
            for which in (0, 1):
                self._widen(unit, i, which, raw_stage, stage)
            if self.case.has_scales:
                self._pass_scales(unit, i, raw_stage, stage)
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

    def _pages(self, unit: Unit, i: jax.Array) -> list[jax.Array]:
        """The pages of block i, read a block ahead, for the copies would wait."""
        units = self.case.units
        return read_pages(self.page_tables, unit.slot, unit.begin + i * units.per_block, unit.end, units)

    def _fetch(self, unit: Unit, i: jax.Array, pages: list[jax.Array], block: tuple[Any, Any, Any], here: Any) -> None:
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

    def _widen(self, unit: Unit, i: jax.Array, which: int, raw_stage: jax.Array, stage: jax.Array) -> None:
        layout = plgpu.Layout.WGMMA_UPCAST_2X
        for columns in widened_columns(self.scratch["raw"].shape[3]):
            raw = plgpu.load(self.scratch["raw"].at[raw_stage, which, :, columns], layout=layout, optimized=False)
            wide = raw.astype(self.case.math_dtype)
            if which:
                wide = self._cleared(wide, unit, i, layout)
            self.scratch["values" if which else "keys"].at[stage, :, columns][...] = wide

    def _pass_scales(self, unit: Unit, i: jax.Array, raw_stage: jax.Array, stage: jax.Array) -> None:
        """To the consumers, and none of keys past the slot's last."""
        shape = (2, self.case.units.block_keys)
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)
        scales = plgpu.load(self.scratch["raw_scales"].at[raw_stage], layout=layout, optimized=False)
        position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) + unit.key_of(i)
        self.scratch["scales"].at[stage][...] = jnp.where(position < unit.num_keys, scales, 0.0)

    def _cleared(self, values: jax.Array, unit: Unit, i: jax.Array, layout: Any) -> jax.Array:
        """Zeros past the slot's last key: a weight of 0 does not hide a NaN."""
        position = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + unit.key_of(i)
        return jnp.where(position < unit.num_keys, values, jnp.zeros((), values.dtype))


class _Sums(NamedTuple):
    """What a consumer's rows have seen so far."""

    peak: jax.Array  # [64] the highest score, in units of log 2
    total: jax.Array  # [64] of the weights
    mixed: jax.Array  # [64, H] weights @ values


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

    def attend(self, num_before: jax.Array, unit: Unit) -> jax.Array:
        """One tile and KV head."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        q_here = self.scratch["q_here"].at[self.index]

        @pl.loop(0, ROWS_EACH // self.case.piece_rows)
        def _(piece: jax.Array) -> None:
            plgpu.copy_gmem_to_smem(self._piece(unit, self.q, piece), self._q.at[self._piece_rows(piece)], q_here)

        plgpu.barrier_wait(q_here)
        if not self.case.is_overlapped:
            self._put(unit, self._visit(unit, 0, functools.partial(self._join, num_before, unit), self._nothing))
            return num_before + unit.num_blocks

        @pl.when(unit.num_blocks > 0)
        def _() -> None:
            self._put(unit, self._overlapped(num_before, unit))

        @pl.when(unit.num_blocks == 0)
        def _() -> None:
            self._put(unit, self._nothing)

        return num_before + unit.num_blocks

    def _put(self, unit: Unit, sums: _Sums) -> None:
        """Store the tile's own rows of the output."""
        peak, total, mixed = sums
        if self.sinks is not None:
            sink = plgpu.load(self.sinks.at[unit.head, self.rows], layout=BY_ROW, optimized=False)
            top = jnp.maximum(peak, sink)
            mixed = mixed * along_columns(jnp.exp2(peak - top), mixed.shape)
            total = total * jnp.exp2(peak - top) + jnp.exp2(sink - top)
        plgpu.commit_smem()  # all warps are done with q's tile, which is where most of the outputs go
        total = jnp.maximum(total, SMALLEST)
        staged = self.scratch.get("staged", self.scratch["q_tile"]).at[self.index]
        staged[...] = (mixed / along_columns(total, mixed.shape)).astype(staged.dtype)
        plgpu.commit_smem()
        num_rows = unit.num_queries * self.case.num_groups - self.index * ROWS_EACH
        whole = ROWS_EACH // self.case.piece_rows
        num_pieces = 1 if self.case.is_tiled else jnp.clip(lax.div(num_rows, self.case.piece_rows), 0, whole)

        @pl.loop(0, num_pieces)
        def _(piece: jax.Array) -> None:
            plgpu.copy_smem_to_gmem(staged.at[self._piece_rows(piece)], self._piece(unit, self.output, piece))

    def _piece_rows(self, piece: jax.Array) -> Any:
        """Which of the 64 rows a piece is."""
        return pl.ds(piece * self.case.piece_rows, self.case.piece_rows)

    def _piece(self, unit: Unit, array: Any, piece: jax.Array) -> Any:
        """A piece's part of q or the output; of what is behind q's last row, any."""
        if self.case.is_tiled:
            return array.at[unit.tile, unit.head, self.rows]
        row = self.index * ROWS_EACH + piece * self.case.piece_rows
        query, group = lax.div(row, self.case.num_groups), lax.rem(row, self.case.num_groups)
        query = jnp.minimum(unit.row + query, array.shape[0] - 1)
        return array.at[query, unit.head, pl.ds(group, self.case.piece_rows)]

    @property
    def _q(self) -> Any:
        return self.scratch["q_tile"].at[self.index]

    def _keys(self, stage: jax.Array) -> Any:
        return self.scratch["keys"].at[stage].transpose((1, 0))

    @property
    def _nothing(self) -> _Sums:
        """Of rows that have seen no key."""
        peak, total = full((ROWS_EACH,), MASKED, BY_ROW), full((ROWS_EACH,), 0.0, BY_ROW)
        return _Sums(peak, total, full(self._q.shape, 0.0, plgpu.Layout.WGMMA))

    def _visit(self, unit: Unit, begin: int, step: Callable[[bool, jax.Array, Any], Any], carry: Any) -> Any:
        """step(is_masked, i, carry) for each block i from `begin`; masked where the rows do not see all of its keys."""
        first, end = (jnp.maximum(block, begin) for block in unit.unmasked)
        if self.case.window is not None:
            carry = lax.fori_loop(begin, first, functools.partial(step, True), carry)
        carry = lax.fori_loop(first, end, functools.partial(step, False), carry)
        return lax.fori_loop(end, unit.num_blocks, functools.partial(step, True), carry)

    def _join(self, num_before: jax.Array, unit: Unit, is_masked: bool, i: jax.Array, sums: _Sums) -> _Sums:
        """Block i, one product behind the other."""
        stage = self._wait_for(num_before + i)
        sums, weights = self._weigh(unit, i, stage, self._scores(stage), sums, is_masked)
        return self._add(stage, sums, weights)

    def _overlapped(self, num_before: jax.Array, unit: Unit) -> _Sums:
        """All blocks of a unit that has some, each one's scores multiplied together with the values before it."""
        stage = self._wait_for(num_before)
        carry = self._weigh(unit, jnp.int32(0), stage, self._scores(stage), self._nothing, is_masked=True)
        sums, weights = self._visit(unit, 1, functools.partial(self._follow, num_before, unit), carry)
        return self._add(self._stage(num_before + unit.num_blocks - 1), sums, weights)

    def _follow(
        self, num_before: jax.Array, unit: Unit, is_masked: bool, i: jax.Array, carry: tuple[_Sums, jax.Array]
    ) -> tuple[_Sums, jax.Array]:
        """The values of block i - 1 and the scores of block i."""
        sums, weights = carry
        stage = self._wait_for(num_before + i)
        before = self._stage(num_before + i - 1)
        if not self.case.weights_in_registers:
            sums = self._add(before, sums, weights)
            return self._weigh(unit, i, stage, self._scores(stage), sums, is_masked)

        def run(products: Any) -> tuple[_Sums, jax.Array]:
            plgpu.wgmma(products, self._q, self._keys(stage))
            return self._add(before, sums, weights), products[...]

        shape = (ROWS_EACH, self.case.units.block_keys)
        sums, scores = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        return self._weigh(unit, i, stage, scores, sums, is_masked)

    def _stage(self, count: jax.Array) -> jax.Array:
        return lax.rem(count, self.case.stages)

    def _wait_for(self, count: jax.Array) -> jax.Array:
        """The stage of a block, when it is there."""
        stage = self._stage(count)
        plgpu.barrier_wait(self.scratch["here"].at[stage])
        return stage

    def _scores(self, stage: jax.Array) -> jax.Array:
        """q @ keys in float32."""
        return product_of(self.scratch)((ROWS_EACH, self.case.units.block_keys), self._q, self._keys(stage))

    def _weigh(
        self, unit: Unit, i: jax.Array, stage: jax.Array, scores: jax.Array, sums: _Sums, is_masked: bool
    ) -> tuple[_Sums, jax.Array]:
        """Block i but for its values: what was summed up before it decays, and its keys' weights."""
        scores, factor = self._log2_scores(self._scaled(scores, stage, 0))
        if is_masked:
            scores = self._masked(scores, unit.key_of(i), unit.position)
        peak = jnp.maximum(sums.peak, jnp.max(scores, axis=1) * factor)
        weights = jnp.exp2(scores * factor - along_columns(peak, scores.shape))
        decay = jnp.exp2(sums.peak - peak)
        total = sums.total * decay + jnp.sum(weights, axis=1)
        mixed = sums.mixed * along_columns(decay, sums.mixed.shape)
        weights = self._scaled(weights, stage, 1).astype(self.case.math_dtype)
        barred: tuple[_Sums, jax.Array] = lax.optimization_barrier((_Sums(peak, total, mixed), weights))
        return barred

    def _scaled(self, columns: jax.Array, stage: jax.Array, which: int) -> jax.Array:
        """Scores [64, keys] times their keys' scales (0), or weights times their values' (1), if there are any."""
        if not self.case.has_scales:
            return columns
        scales = plgpu.load(self.scratch["scales"].at[stage, which], layout=BY_COLUMN, optimized=False)
        return columns * along_rows(scales, columns.shape)

    def _log2_scores(self, products: jax.Array) -> tuple[jax.Array, float]:
        """Scores, and what makes them powers of two: the peak is found first, and scaled, so that scores never are."""
        if self.case.soft_cap is None and self.case.scale > 0:
            return products, self.case.scale * LOG2_E
        return log2_scores(products, self.case.scale, self.case.soft_cap), 1.0

    def _masked(self, scores: jax.Array, first_key: jax.Array, position: jax.Array) -> jax.Array:
        """Scores [64, keys] of the keys from `first_key` that the rows of a tile at `position` see."""
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + first_key
        position = plgpu.load(self.row_queries.at[self.rows], layout=BY_ROW, optimized=False) + position
        last = along_columns(position, scores.shape)
        is_visible = key <= last
        if self.case.window is not None:
            is_visible &= key > last - self.case.window
        return jnp.where(is_visible, scores, MASKED)

    def _add(self, stage: jax.Array, sums: _Sums, weights: jax.Array) -> _Sums:
        """Add weights @ values of a stage, waited for as is all that is in flight, and free it."""
        values = self.scratch["values"].at[stage]
        if self.case.weights_in_registers:
            accumulator = plgpu.WGMMAAccumulatorRef.init(sums.mixed)
            mixed = pl.run_state(lambda mixed: plgpu.wgmma(mixed, weights, values))(accumulator)
        else:
            tile = self.scratch["weights"].at[self.index]
            tile[...] = weights
            plgpu.commit_smem()
            mixed = sums.mixed + product_of(self.scratch)(sums.mixed.shape, tile, values)
        plgpu.barrier_arrive(self.scratch["free"].at[stage])
        return sums._replace(mixed=mixed)
