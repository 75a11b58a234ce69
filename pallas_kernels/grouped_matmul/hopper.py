"""Grouped matmul for Hopper: TMA, wgmma, and a work list that is made on the device.

Schedule. Operands are swapped: the weight tile [channels, in] is wgmma's M side, a tile of rows its N side, so that few
rows cost few columns (8 instead of 64) and fp8, whose operands must both run along `in`, needs no transpose.
An item is one group's part of a tile of `rows` rows times `2 * channels` output channels; items are dealt out over
persistent blocks, panels of output channels outermost, so that what runs at once shares weights and rows in L2.
A producer warpgroup keeps `stages` tiles of both operands in flight with TMA, over the ends of items too; two consumer
warpgroups take half of the channels each. Tiles begin at multiples of 8 rows, since TMA reads into tiles of 8. Rows
before and past a tile's own are computed and not stored: a full tile leaves in one TMA store, another row by row. Rows
beyond all groups are tiles without steps, which store zeros; empty groups have no tiles. Reading weights bounds it
where groups have few rows (36 KB per SM and microsecond: at least 64 KB are in flight), wgmma where they have many
(128 x 256 tiles).

Operands. A slot is refilled only after both consumers arrived at its `free` barrier. A consumer arrives for the slot of
step k-1 after `wgmma_wait(1)` behind the wgmma of step k, which leaves only that one in flight; and for an item's last
slot after the accumulator was read, which waits for all. The staged output is rewritten only after its TMA stores have
read it (`wait_smem_to_gmem` by the warpgroup that issued them, whose own slot it is).
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from ..dispatch import Platform
from ..mosaic import LINE_BYTES, swizzled
from ..quantized_matmul.contract import QuantizedWeight
from ..quantized_matmul.row_tiles import (
    STAGED_BYTES,
    Item,
    Items,
    Sizes,
    drain,
    is_fp8,
    operands,
    scaled,
    store_rows,
    stored_as,
)
from . import hopper_a16
from .kernel_call import call, tuned_sizes

if TYPE_CHECKING:
    from . import GroupedMatmulProblem

CONSUMERS = 2  # warpgroups that multiply
ROW_TILES = (8, 16, 32, 64, 128)


def unsupported(problem: "GroupedMatmulProblem") -> str | None:
    """Why this file cannot serve a problem."""
    if problem.dtype != "bfloat16":
        return f"activations must be bfloat16, not {problem.dtype}"
    if problem.format is not None and not is_fp8(problem.format):
        return hopper_a16.unsupported(problem.format, problem.in_dim, problem.out_dim, problem.device_kind)
    inputs = LINE_BYTES // (2 if problem.format is None else 1)
    if problem.out_dim % 64 or problem.in_dim % inputs:
        return f"out must be a multiple of 64 and in of {inputs}, not {problem.out_dim} and {problem.in_dim}"
    return None


def grouped_matmul(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    group_sizes: jax.Array,
    *,
    platform: Platform,
    out_dtype: DTypeLike,
    device_kind: str,
    sizes: Sizes | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See the contract; gradients are those of the xla implementation. `sizes` are the tuned ones if None."""
    if isinstance(weight, QuantizedWeight) and not is_fp8(weight.format):
        tile = hopper_a16.tile_for(weight.format, x.shape[0], weight.shape[0], weight.shape[1], device_kind)
        return hopper_a16.grouped_matmul(x, weight, group_sizes, tile=tile, out_dtype=out_dtype, interpret=interpret)
    sizes = sizes or tuned_sizes(x, weight, ROW_TILES, device_kind)
    kernel = functools.partial(_multiply, sizes=sizes, interpret=interpret)
    return call(kernel, x, weight, group_sizes, platform=platform, out_dtype=out_dtype)


def _multiply(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    *,
    sizes: Sizes,
    out_dtype: jnp.dtype,
    interpret: Any,
) -> jax.Array:
    """x [M, in] times weight [E, out, in] of one dtype; `scales` are [M] and [E, out]."""
    num_rows, out_dim = x.shape[0], weight.shape[1]
    if not num_rows:
        return jnp.zeros((0, out_dim), out_dtype)
    stored_dtype = stored_as(out_dtype)
    line = LINE_BYTES // x.dtype.itemsize
    channels = sizes.channels if out_dim % sizes.channels == 0 else 64
    staged_rows = min(sizes.rows, STAGED_BYTES // (CONSUMERS * channels * stored_dtype.itemsize))
    kernel = plgpu.kernel(
        functools.partial(_body, sizes=sizes, line=line, is_scaled=scales is not None),
        out_type=jax.ShapeDtypeStruct((num_rows, out_dim), stored_dtype),
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[
            swizzled((sizes.stages, sizes.rows, line), x.dtype),
            swizzled((sizes.stages, CONSUMERS, channels, line), x.dtype),
            plgpu.SMEM((CONSUMERS, staged_rows, channels), stored_dtype),
            plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=sizes.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=sizes.stages),
        ],
        # Row-major staging has bank conflicts, which warpgroup semantics (0.12) takes for an error.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="grouped_matmul_hopper",
    )
    output: jax.Array = kernel(*operands(x, weight, group_sizes, scales, sizes.rows))
    return output.astype(out_dtype)


def _body(
    tiles: Any, num_tiles: Any, x: Any, weight: Any, *refs: Any, sizes: Sizes, line: int, is_scaled: bool
) -> None:
    scales = refs[:2] if is_scaled else None
    out, x_tile, weight_tile, staged, full, free = refs[2 if is_scaled else 0 :]
    # x_tile [stages, rows, line], weight_tile [stages, CONSUMERS, channels, line], staged [CONSUMERS, rows, channels]
    channels, (num_groups, out_dim, in_dim) = weight_tile.shape[2], weight.shape
    num_out = pl.cdiv(out_dim, CONSUMERS * channels)
    items = Items(tiles, num_tiles[0], num_groups, num_out, pl.cdiv(in_dim, line), sizes)
    warpgroup = lax.axis_index("warpgroup")

    def channel_slice(item: Item, consumer: Any) -> Any:
        return pl.ds((item.out_tile * CONSUMERS + consumer) * channels, channels)

    def load(item: Item) -> None:
        @pl.loop(0, item.steps)
        def _(k: jax.Array) -> None:
            slot = lax.rem(item.steps_before + k, sizes.stages)

            @pl.when(item.steps_before + k >= sizes.stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            inputs = pl.ds(k * line, line)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(item.start, sizes.rows), inputs], x_tile.at[slot], full.at[slot])
            for consumer in range(CONSUMERS):
                source = weight.at[item.group, channel_slice(item, consumer), inputs]
                plgpu.copy_gmem_to_smem(source, weight_tile.at[slot, consumer], full.at[slot])

    def multiply(item: Item) -> None:
        def product(sums: Any) -> jax.Array:
            @pl.loop(0, item.steps)
            def _(k: jax.Array) -> None:
                slot = lax.rem(item.steps_before + k, sizes.stages)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(sums, weight_tile.at[slot, warpgroup], x_tile.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _() -> None:
                    plgpu.barrier_arrive(free.at[lax.rem(item.steps_before + k - 1, sizes.stages)])

            total: jax.Array = sums[...]
            return total

        result = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((channels, sizes.rows), jnp.float32))

        @pl.when(item.steps > 0)
        def _() -> None:
            plgpu.barrier_arrive(free.at[lax.rem(item.steps_before + item.steps - 1, sizes.stages)])

        num_staged = staged.shape[1]
        for first in range(0, sizes.rows, num_staged):
            piece = lax.slice(result, (0, first), (channels, first + num_staged))
            if scales is not None:
                # The last tile of channels may lie beyond all of them; nothing of it is stored.
                channel = jnp.minimum((item.out_tile * CONSUMERS + warpgroup) * channels, out_dim - channels)
                by_row = scales[0].at[pl.ds(item.start + first, num_staged)]
                piece = scaled(piece, by_row, scales[1].at[item.group, pl.ds(channel, channels)], plgpu.Layout.WGMMA)
                piece = jnp.where(item.steps > 0, piece, 0.0)  # there the scales are nobody's
            target = channel_slice(item, warpgroup)
            store_rows(
                piece, staged.at[warpgroup], out, item.start + first, item.own, target, plgpu.Layout.WGMMA_TRANSPOSED
            )

    @pl.when(warpgroup == CONSUMERS)
    def _() -> None:
        drain(free, items.visit(load), sizes.stages)

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        items.visit(multiply)
        plgpu.wait_smem_to_gmem(0)
