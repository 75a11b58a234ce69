"""Pieces that the Hopper paged attention kernels share: shared memory tiles, copies of blocks, scores."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ..hopper_operands import joined
from ..mosaic import BY_COLUMN, store
from .hopper_work import Units

MASKED = -1e30  # finite, so that what has seen no key yet makes no NaN
LOG2_E = math.log2(math.e)


def line_bytes(row_bytes: int) -> int:
    """The widest swizzle that divides a row: 128, 64 or 32 bytes; 0 if none does."""
    return next((size for size in (128, 64, 32) if row_bytes % size == 0), 0)


def output_tiles(head_dim: int) -> tuple[int, ...]:
    """Where the tiles of 64 of a head begin; the last two overlap where 64 does not divide it."""
    return tuple(min(start, head_dim - 64) for start in range(0, head_dim, 64))


def widened_columns(head_dim: int) -> tuple[Any, ...]:
    """Slices of a head's columns that are widened at once: few registers, and whole lines of an 8-bit tile."""
    width = 128 if head_dim % 128 == 0 else head_dim
    return tuple(pl.ds(start, width) for start in range(0, head_dim, width))


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    """An array of one float32 in registers."""
    array: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    return array


def along_rows(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each column, repeated over the rows."""
    return lax.broadcast_in_dim(columns, shape, (1,))


def along_columns(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each row, repeated over the columns."""
    return lax.broadcast_in_dim(rows, shape, (0,))


def product(shape: tuple[int, int], left: Any, right: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
    """left @ right in float32, waited for; `meanwhile` runs while the tensor cores do."""

    def run(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, left, right)
        if meanwhile is not None:
            meanwhile()
        result: jax.Array = sums[...]
        return result

    result: jax.Array = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    return result


def products(
    shape: tuple[int, int],
    factors: Iterable[Iterable[tuple[Any, Any]]],
    meanwhile: Callable[[], list[Any]] = list,
) -> tuple[list[jax.Array], list[Any]]:
    """For each of `factors` the sum of its left @ right in float32, waited for at once; and what `meanwhile` made."""
    factors = list(factors)

    def run(*sums: Any) -> tuple[list[jax.Array], list[Any]]:
        for one, pairs in zip(sums, factors, strict=True):
            for left, right in pairs:
                plgpu.wgmma(one, left, right)
        made = meanwhile()
        return [one[...] for one in sums], made

    accumulators = [plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for _ in factors]
    results: tuple[list[jax.Array], list[Any]] = pl.run_scoped(run, *accumulators)
    return results


def tensor_memory(*widths: int) -> dict[str, Any]:
    """What Blackwell's products of 64 rows and such numbers of columns need, for one warpgroup."""
    sums: dict[str, Any] = {f"sums_{width}": plgpu.TMEM((64, width), jnp.float32) for width in set(widths)}
    barriers = {name: plgpu.Barrier(orders_tensor_core=True) for name in ("multiplied", "loaded")}
    return sums | barriers


def product_of(scratch: Mapping[str, Any]) -> Callable[..., jax.Array]:
    """`product`, or where the scratch has tensor memory the same by tcgen05."""
    if "multiplied" not in scratch:
        return product

    def run(shape: tuple[int, int], left: Any, right: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
        sums = scratch[f"sums_{shape[1]}"]
        plgpu.tcgen05_mma(sums, left, right, scratch["multiplied"], accumulate=False)
        if meanwhile is not None:
            meanwhile()
        plgpu.barrier_wait(scratch["multiplied"])
        result: jax.Array = plgpu.async_load_tmem(sums, layout=plgpu.Layout.WGMMA)
        # One thread issues the next product: not before all of them have read this one.
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(scratch["loaded"])
        plgpu.barrier_wait(scratch["loaded"])
        return result

    return run


def log2_scores(products: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """Scaled and capped scores in units of log 2, so that their exponentials are powers of two."""
    if soft_cap is None:
        return products * (scale * LOG2_E)
    # tanh x = 1 - 2 / (1 + e^2x): the hardware's own tanh is only as exact as bfloat16.
    shrunk = 1.0 - 2.0 / (1.0 + jnp.exp2(products * (2.0 * scale * LOG2_E / soft_cap)))
    return shrunk * (soft_cap * LOG2_E)


def read_pages(table: Any, slot: jax.Array, first_unit: Any, end_unit: jax.Array, units: Units) -> list[jax.Array]:
    """The page of each unit of the block that begins at `first_unit`; past the end that of the last unit again.

    A slot's last block may lack units, and what its page table holds there is anything at all.
    """
    numbers = (jnp.minimum(first_unit + i, end_unit - 1) for i in range(units.per_block))
    return [table[slot, lax.div(unit, units.per_page)] for unit in numbers]


def source_keys(first_unit: Any, end_unit: jax.Array, units: Units) -> list[Any]:
    """Which keys of its page each unit of a block is, as `read_pages` says; seen to be whole rows of tiles."""
    if units.per_page == 1:
        return [pl.ds(0, units.keys)] * units.per_block
    numbers = (jnp.minimum(first_unit + i, end_unit - 1) for i in range(units.per_block))
    return [pl.ds(lax.rem(unit, units.per_page) * units.keys, units.keys) for unit in numbers]


def stage_output(
    peak: jax.Array, total: jax.Array, mixed: list[jax.Array], sinks: Any, put: "Put", staged: Any
) -> None:
    """The output [G, H] of a whole slot, in shared memory and ready to be copied."""
    if sinks is not None:
        sink = plgpu.load(sinks, layout=BY_COLUMN, optimized=False)
        top = jnp.maximum(peak, sink)
        decay = jnp.exp2(peak - top)
        total = total * decay + jnp.exp2(sink - top)
        mixed = [tile * along_rows(decay, tile.shape) for tile in mixed]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    put([(tile / along_rows(total, tile.shape)).astype(staged.dtype) for tile in mixed], staged)
    plgpu.commit_smem()


Put = Callable[[list[jax.Array], Any], None]  # tiles of sums [64, G] into an output [G, H]


def put_tiles(tiles: list[jax.Array], staged: Any) -> None:
    """Tiles of `output_tiles`."""
    for start, tile in zip(output_tiles(staged.shape[1]), tiles, strict=True):
        staged.at[:, pl.ds(start, 64)].transpose((1, 0))[...] = tile


def put_joined(is_interpreted: bool, tiles: list[jax.Array], staged: Any) -> None:
    """Two tiles for each 128 of a head: even places, and odd ones."""
    for i in range(0, len(tiles), 2):
        both = joined(tiles[i], tiles[i + 1], is_interpreted)
        store(staged.at[:, pl.ds(64 * i, 128)].transpose((1, 0)), both)
