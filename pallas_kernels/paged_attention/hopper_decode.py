"""Paged attention of one query per slot on Hopper; what it splits, hopper_reduce joins.

Schedule: persistent CTAs of one warpgroup, several to an SM, walk over units of work (item, KV head). A unit keeps
`stages` blocks of 64 keys and values in flight by TMA, page by page, while it computes on the oldest. The operands are
swapped, S^T = K Q^T [64 keys, G] and O^T = V^T P^T [H, G], so that the G heads which share a KV head are wgmma's N
(8 at least) and nothing is padded to M = 64; P goes through shared memory. The softmax is the running one, down the
columns; its sum stays spread over the rows until the end. Page numbers are read one block ahead.
A slot of one item is written out, one without keys as zeros; the others leave float32 sums, maxima and totals.
Reading the pages bounds it: 36 KB must arrive per SM and microsecond on an H200, 64 KB and more per CTA are asked for.

8-bit pages are widened, to float16 (e4m3) or to the queries' dtype (int8, whose scales multiply scores and weights). K
and V^T both being M, which may be registers, heads of 128 and 256 are widened there (hopper_operands): `ldmatrix`
brings words of K, transposed those of V, and each becomes two pairs by two conversions. So 16 KB of a block are written
and read once, and some 330 instructions of a warp (e4m3) are left, of which its SM has time for 900. What heads have
pairs of takes the query in the same order, and gives sums of even and of odd places of the head (`joined`). Other heads
are widened through shared memory, three times the bytes.

Operands under a wgmma: each product is waited for before its result is used, so only other warps' shares can be in
flight. A stage is refilled after the `commit_smem` of the next block (widened: of the same one), a barrier of the
warpgroup that each warp passes only when it has waited for its own products with that stage, or has what it reads of
it in registers. P, and the widened K and V, are overwritten only behind a barrier (the reduction over rows, and the
commits) that follows all warps' waits. An operand in registers is a value of its own, written before its wgmma and
never after it; the compiler keeps it until the wait, behind which alone its registers may serve another.
With operands in registers Pallas adds no barriers of its own around stores and copies: P and the staged output are
written behind a barrier (the reduction, the wait for the last copy) and read behind a commit, copies into stages and
queries begin behind a commit or the sum's reduction, and no thread reads what another stores in any other place.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ..hopper_operands import (
    BYTES,
    WORD_LAYOUT,
    WORDS,
    both_pairs,
    converted_dtype,
    in_order_of_pairs,
    through_memory,
    transposed_words_of,
    words_of,
)
from ..mosaic import BY_COLUMN, BY_ROW, store, swizzled
from .hopper_tiles import (
    LOG2_E,
    MASKED,
    Put,
    along_columns,
    along_rows,
    full,
    line_bytes,
    log2_scores,
    output_tiles,
    product_of,
    products,
    put_joined,
    put_tiles,
    read_pages,
    source_keys,
    stage_output,
    tensor_memory,
    widened_columns,
)
from .hopper_work import BLOCK_KEYS, Case, Keys, Place, Split, item_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Case):
    """What one decode kernel is compiled for; its G heads per KV head are padded to a multiple of 8.

    Products by tcgen05 want G a multiple of 32.
    """

    head_dim: int
    split: Split
    is_interpreted: bool = False  # operands in registers go through shared memory

    @property
    def in_registers(self) -> bool:
        """Whether 8-bit pages are widened in the registers that wgmma reads, and not through shared memory."""
        fits = self.is_widened and self.head_dim % BYTES == 0 and not self.has_tensor_memory
        return bool(fits and self.math_dtype == converted_dtype(self.cache_dtype))

    @property
    def put(self) -> Put:
        """How tiles of sums become an output."""
        return functools.partial(put_joined, self.is_interpreted) if self.in_registers else put_tiles

    def shared_bytes(self, num_groups: int) -> int:
        """What a CTA takes of an SM's shared memory, but for barriers."""
        block, math_bytes = 2 * BLOCK_KEYS * self.head_dim, self.math_dtype.itemsize
        pages = self.stages * block * jnp.dtype(self.cache_dtype).itemsize
        tiles = num_groups * (2 * self.head_dim + BLOCK_KEYS) * math_bytes
        return int(pages + tiles + (block * math_bytes if self.is_widened and not self.in_registers else 0))


def decode(
    q: jax.Array, keys: Keys, rows: jax.Array, sinks: jax.Array | None, case: Decode
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    """Slot b's query, row rows[b] of q [T, K, G, H], over its keys: [B, K, G, H] where a slot has one item, or none.

    Without keys it is zeros. Also, of every item of a slot that has several, slot * split.most + index, the sums of
    values [M, K, H, G] in tiles that `case.put` knows, and the maxima (in units of log 2) and totals [M, K, 2, G]. All
    else is left as it was found: nothing may be read there.
    """
    num_kv_heads, num_groups, head_dim = q.shape[1:]
    num_slots = rows.shape[0]
    num_items = num_slots * case.split.most if case.split.most > 1 else 1
    wide_q = q.astype(case.math_dtype)
    if case.in_registers:
        wide_q = in_order_of_pairs(wide_q.reshape(-1, head_dim)).reshape(q.shape)
    arguments = [wide_q, keys.cache.values, *keys[1:], rows]
    if keys.cache.scales is not None:
        arguments.append(keys.cache.scales)
    if sinks is not None:
        arguments.append((sinks.astype(jnp.float32) * LOG2_E).reshape(num_kv_heads, -1))
    kernel = plgpu.kernel(
        functools.partial(_body, case),
        out_type=[
            jax.ShapeDtypeStruct((num_slots, num_kv_heads, num_groups, head_dim), q.dtype),
            jax.ShapeDtypeStruct((num_items, num_kv_heads, head_dim, num_groups), jnp.float32),
            jax.ShapeDtypeStruct((num_items, num_kv_heads, 2, num_groups), jnp.float32),
        ],
        grid=(min(case.num_ctas, num_slots * case.split.most * num_kv_heads),),
        grid_names=("cta",),
        scratch_types=_scratch(case, num_groups, head_dim),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=case.in_registers),
        kernel_name=f"paged_decode_{'blackwell' if case.has_tensor_memory else 'hopper'}",
    )
    output, sums, peaks = kernel(*arguments)
    return output, (sums, peaks)


def _scratch(case: Decode, num_groups: int, head_dim: int) -> dict[str, Any]:
    line = line_bytes(head_dim * case.math_dtype.itemsize)
    raw_line = line_bytes(head_dim * jnp.dtype(case.cache_dtype).itemsize)
    block = (2, BLOCK_KEYS, head_dim)
    num_copies = case.units.per_block * (4 if case.has_scales else 2)
    # Products of 64 rows by tcgen05 take the columns in halves, and a swizzle may not reach past its half.
    narrow = min(line, num_groups) if case.has_tensor_memory else line
    plain = plgpu.SMEM((case.stages, *block), case.cache_dtype)  # of heads that no swizzle divides, and no wgmma reads
    scratch = {
        "q_tile": swizzled((num_groups, head_dim), case.math_dtype, narrow),
        "pages": swizzled((case.stages, *block), case.cache_dtype, raw_line) if raw_line else plain,
        "weights": swizzled((num_groups, BLOCK_KEYS), case.math_dtype, narrow),
        "staged": swizzled((num_groups, head_dim), case.dtype, line),
        "q_here": plgpu.Barrier(),
        "here": plgpu.Barrier(num_arrivals=num_copies, num_barriers=case.stages),
    }
    if case.in_registers and case.is_interpreted:
        scratch["operands"] = swizzled((head_dim // 64, BLOCK_KEYS, 64), case.math_dtype)
    elif case.is_widened and not case.in_registers:
        scratch["wide"] = swizzled(block, case.math_dtype, line)
    if case.has_scales:
        scratch["scales"] = plgpu.SMEM((case.stages, 2, BLOCK_KEYS), jnp.float32)
    return scratch | tensor_memory(num_groups) if case.has_tensor_memory else scratch


def _body(case: Decode, *refs: Any, **scratch: Any) -> None:
    q, values, layer, page_tables, kv_lens, rows, *rest = refs
    scales = rest.pop(0) if case.has_scales else None
    sinks = rest.pop(0) if case.has_sinks else None
    output, sums, peaks = rest
    num_kv_heads, num_slots = q.shape[1], rows.shape[0]

    @pl.loop(lax.axis_index("cta"), num_slots * case.split.most * num_kv_heads, step=lax.axis_size("cta"))
    def _(number: jax.Array) -> None:
        # First items first: where most slots have one, the empty items are the last to be passed over.
        head, rest = lax.rem(number, num_kv_heads), lax.div(number, num_kv_heads)
        slot, index = lax.rem(rest, num_slots), lax.div(rest, num_slots)
        first, end, num_items = item_of(kv_lens[slot], index, Place(case.units, case.window), case.split)
        arrays = (values, scales, page_tables)
        unit = _Unit(case, arrays, scratch, layer[0], slot, head, first, end, kv_lens[slot])

        @pl.when(first < end)
        def _() -> None:
            plgpu.copy_gmem_to_smem(q.at[rows[slot], head], scratch["q_tile"], scratch["q_here"])
            peak, total, mixed = _attend(unit)
            total = jnp.sum(total, axis=0)  # over all warps: the next unit's copies come behind this barrier

            @pl.when(num_items == 1)
            def _() -> None:
                sink = None if sinks is None else sinks.at[head]
                stage_output(peak, total, mixed, sink, case.put, scratch["staged"])
                plgpu.copy_smem_to_gmem(scratch["staged"], output.at[slot, head])

            if case.split.most > 1:

                @pl.when(num_items > 1)
                def _() -> None:
                    item = slot * case.split.most + index
                    store(peaks.at[item, head, 0], peak)
                    store(peaks.at[item, head, 1], total)
                    for start, tile in zip(output_tiles(q.shape[3]), mixed, strict=True):
                        store(sums.at[item, head, pl.ds(start, 64)], tile)

        @pl.when((index == 0) & (num_items == 0))
        def _() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            zeros = full((64, q.shape[2]), 0.0, plgpu.Layout.WGMMA).astype(case.dtype)
            case.put([zeros for _ in output_tiles(case.head_dim)], scratch["staged"])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch["staged"], output.at[slot, head])

    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Blocks of one slot and KV head, the ring in shared memory that they pass through, and where they come from."""

    case: Decode
    arrays: tuple[Any, Any, Any]  # values [L, P, 2, K, Z, H], scales [L, P, 2, K, Z] or None, page tables
    scratch: dict[str, Any]
    layer: jax.Array
    slot: jax.Array
    head: jax.Array
    first: jax.Array  # units of keys
    end: jax.Array
    num_keys: jax.Array  # of the slot

    @property
    def num_blocks(self) -> jax.Array:
        """Blocks of keys."""
        return lax.div(self.end - self.first + self.case.units.per_block - 1, self.case.units.per_block)

    def pages(self, i: Any) -> list[jax.Array]:
        """The pages of block i."""
        return read_pages(self.arrays[2], self.slot, self._first_of(i), self.end, self.case.units)

    def fetch(self, i: Any, pages: list[jax.Array]) -> None:
        """Start copying block i into the ring."""
        (values, scales, _), size, stage = self.arrays, self.case.units.keys, lax.rem(jnp.int32(i), self.case.stages)
        here, sources = self.scratch["here"].at[stage], source_keys(self._first_of(i), self.end, self.case.units)
        for j, (page, source) in enumerate(zip(pages, sources, strict=True)):
            target = pl.ds(j * size, size)
            for which in (0, 1):
                place = (self.layer, page, which, self.head, source)
                plgpu.copy_gmem_to_smem(values.at[place], self.scratch["pages"].at[stage, which, target], here)
                if scales is not None:
                    plgpu.copy_gmem_to_smem(scales.at[place], self.scratch["scales"].at[stage, which, target], here)

    def block(self, i: jax.Array) -> "_Block":
        """Block i, when it has arrived."""
        stage = lax.rem(i, self.case.stages)
        plgpu.barrier_wait(self.scratch["here"].at[stage])
        key = self.first * self.case.units.keys + i * BLOCK_KEYS
        kind = _RegisterBlock if self.case.in_registers else _Block
        return kind(self.case, self.scratch, stage, key, self.num_keys)

    def _first_of(self, i: Any) -> jax.Array:
        first: jax.Array = self.first + i * self.case.units.per_block
        return first


def _attend(unit: _Unit) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """The greatest score [G], the totals [64, G] and the sums of values, tiles [64, G], of a unit's blocks."""
    case, scratch, num_blocks = unit.case, unit.scratch, unit.num_blocks
    num_groups, head_dim = scratch["q_tile"].shape
    shape = (BLOCK_KEYS, num_groups)
    for i in range(case.stages):

        @pl.when(i < num_blocks)
        def _(i: int = i) -> None:
            unit.fetch(i, unit.pages(i))

    plgpu.barrier_wait(scratch["q_here"])
    # A block's room is free once the next block's weights were committed, or, where it was widened, its own.
    lag = 0 if case.is_widened else 1

    def attend_block(i: jax.Array, carry: Any) -> Any:
        peak, total, mixed, pages = carry
        following = unit.pages(i + 1 - lag + case.stages)
        block = unit.block(i)
        scores, values = block.scores()
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=0))
        weights = jnp.exp2(scores - along_rows(new_peak, shape))
        decay = along_rows(jnp.exp2(peak - new_peak), shape)
        scratch["weights"].transpose((1, 0))[...] = block.scaled(weights).astype(case.math_dtype)
        plgpu.commit_smem()

        def refill() -> None:
            is_wanted = (i >= lag) & (i - lag + case.stages < num_blocks)
            pl.when(is_wanted)(lambda: unit.fetch(i - lag + case.stages, pages))

        mixed = [old * decay + tile for old, tile in zip(mixed, block.mixed(values, refill), strict=True)]
        return new_peak, total * decay + weights, mixed, following

    zeros = full(shape, 0.0, plgpu.Layout.WGMMA)
    mixed = [zeros for _ in output_tiles(head_dim)]
    carry = (full((num_groups,), MASKED, BY_COLUMN), zeros, mixed, unit.pages(case.stages - lag))
    peak, total, mixed, _ = lax.fori_loop(0, num_blocks, attend_block, carry)
    return peak, total, mixed


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of 64 keys, from position `key` on, that has arrived at a stage of the ring."""

    case: Decode
    scratch: dict[str, Any]
    stage: jax.Array
    key: jax.Array
    num_keys: jax.Array  # of the slot

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile of either product: 64 keys, or 64 of a head, for each of G heads."""
        return BLOCK_KEYS, self.scratch["q_tile"].shape[0]

    @property
    def values(self) -> Any:
        """Where the second product reads the values [64, H]."""
        return self.scratch["wide"].at[1] if self.case.is_widened else self.scratch["pages"].at[self.stage, 1]

    def products(self) -> tuple[jax.Array, list[Any]]:
        """Of keys and the query [64, G]; and, made ready meanwhile, the values as factors of the second products."""
        keys = self.scratch["pages"].at[self.stage, 0]
        if self.case.is_widened:
            self._widen(0)
            plgpu.commit_smem()
            keys = self.scratch["wide"].at[0]
        q = self.scratch["q_tile"].transpose((1, 0))
        sums = product_of(self.scratch)(self.shape, keys, q, meanwhile=self._ready_values)
        tiles = [self.values.at[:, pl.ds(start, 64)] for start in output_tiles(self.case.head_dim)]
        return sums, [tile.transpose((1, 0)) for tile in tiles]

    def mixed(self, values: list[Any], refill: Callable[[], None]) -> list[jax.Array]:
        """Tiles of values times weights [64, G]; `refill` a stage when it costs least."""
        refill()
        weights = self.scratch["weights"].transpose((1, 0))
        return [product_of(self.scratch)(self.shape, tile, weights) for tile in values]

    def scores(self) -> tuple[jax.Array, list[Any]]:
        """Masked scores [64, G] in units of log 2, and the values."""
        (scores, values), shape = self.products(), self.shape
        if self.case.has_scales:
            scores = scores * along_columns(self._scales(0), shape)
        scores = log2_scores(scores, self.case.scale, self.case.soft_cap)
        position = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + self.key
        is_visible = position < self.num_keys
        if self.case.window is not None:
            is_visible &= position >= self.num_keys - self.case.window
        return jnp.where(is_visible, scores, MASKED), values

    def scaled(self, weights: jax.Array) -> jax.Array:
        """Weights times the scales of their values."""
        if not self.case.has_scales:
            return weights
        scales = along_columns(self._scales(1), weights.shape)
        position = plgpu.broadcasted_iota(jnp.int32, weights.shape, 0, layout=plgpu.Layout.WGMMA) + self.key
        return jnp.where(position < self.num_keys, weights * scales, 0.0)

    def _ready_values(self) -> None:
        """Widen the values; those past the slot's last key become zeros, for a weight of 0 does not hide a NaN."""
        if self.case.is_widened:
            self._widen(1)
            return

        @pl.when(self.key + BLOCK_KEYS > self.num_keys)
        def _() -> None:
            for start in output_tiles(self.values.shape[1]):
                tile = self.values.at[:, pl.ds(start, 64)]
                tile[...] = self._zero_past_end(plgpu.load(tile, layout=plgpu.Layout.WGMMA), plgpu.Layout.WGMMA)

    def _widen(self, which: int) -> None:
        """Keys (0) or values (1) as wgmma reads them."""
        layout = plgpu.Layout.WGMMA_UPCAST_2X
        for columns in widened_columns(self.values.shape[1]):
            tile = plgpu.load(self.scratch["pages"].at[self.stage, which, :, columns], layout=layout, optimized=False)
            wide = tile.astype(self.case.math_dtype)
            self.scratch["wide"].at[which, :, columns][...] = self._zero_past_end(wide, layout) if which else wide

    def _zero_past_end(self, values: jax.Array, layout: Any) -> jax.Array:
        position = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + self.key
        return jnp.where(position < self.num_keys, values, jnp.zeros((), values.dtype))

    def _scales(self, which: int) -> jax.Array:
        tile = self.scratch["scales"].at[self.stage, which]
        scales: jax.Array = plgpu.load(tile, layout=BY_ROW, optimized=False)
        return scales


@dataclasses.dataclass(frozen=True)
class _RegisterBlock(_Block):
    """A block whose 8-bit keys and values become operands in registers, 128 of a head at a time."""

    def products(self) -> tuple[jax.Array, list[Any]]:
        """As above; values are in registers from here on."""
        keys = [words_of(self._stored(0, i), self.case.is_interpreted) for i in self._parts]
        values = [transposed_words_of(self._stored(1, i), self.case.is_interpreted) for i in self._parts]
        q = [self.scratch["q_tile"].at[:, pl.ds(start, 64)] for start in range(0, self.case.head_dim, 64)]
        factors = ((self._factor(i, key), q[i].transpose((1, 0))) for i, key in enumerate(self._operands(keys)))
        sums, operands = products(self.shape, [factors], lambda: list(self._operands(self._visible(values))))
        return sums[0], operands

    def mixed(self, values: list[Any], refill: Callable[[], None]) -> list[jax.Array]:
        """As above, waited for together, and while they are refilled."""
        weights = self.scratch["weights"].transpose((1, 0))
        factors = [[(self._factor(i, value), weights)] for i, value in enumerate(values)]

        def meanwhile() -> list[Any]:
            refill()
            return []

        return products(self.shape, factors, meanwhile)[0]

    @property
    def _parts(self) -> range:
        return range(0, self.case.head_dim, BYTES)

    def _stored(self, which: int, start: int) -> Any:
        return self.scratch["pages"].at[self.stage, which, :, pl.ds(start, BYTES)]

    def _operands(self, parts: Iterable[jax.Array]) -> Iterator[jax.Array]:
        """Two operands [64, 64] of each part's words."""
        for words in parts:
            yield from both_pairs(words, self.case.cache_dtype, self.case.is_interpreted)

    def _factor(self, i: int, operand: jax.Array) -> Any:
        """Operand i of a product as wgmma takes it."""
        return through_memory(operand, self.scratch["operands"].at[i] if self.case.is_interpreted else None)

    def _visible(self, values: list[jax.Array]) -> list[jax.Array]:
        """Words of values, zero past the slot's last key, for a weight of 0 does not hide a NaN."""

        def mask(parts: list[jax.Array]) -> list[jax.Array]:
            column = plgpu.broadcasted_iota(jnp.int32, (BLOCK_KEYS, WORDS), 1, layout=WORD_LAYOUT)
            seen = self.num_keys - self.key - 2 * column  # of a word's two keys
            bits = jnp.where(seen > 1, -1, jnp.where(seen > 0, 0xFFFF, 0))
            return [part & bits for part in parts]

        is_last = self.key + BLOCK_KEYS > self.num_keys
        visible: list[jax.Array] = lax.cond(is_last, mask, lambda parts: parts, values)
        return visible
