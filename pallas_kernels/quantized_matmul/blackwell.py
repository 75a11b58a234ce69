"""Matmuls for Blackwell: TMA, tcgen05 and tensor memory; fp8 linear layers, and any groups of rows.

Schedule. As on Hopper the operands are swapped: a weight tile [128 channels, in] is the M side, a tile of rows the N
side, so the accumulator has a channel on each of the 128 lanes of tensor memory and a row in each column. An item is
one group's part of a tile of `rows` rows, which begins at a multiple of 8 since TMA reads into tiles of 8, times 128
channels; the other rows are computed and not stored. Items are dealt out over persistent blocks, one on each SM.
Three warpgroups: one keeps `stages` tiles of both operands in flight with TMA, over the ends of items too; one issues
the products; one scales what is done and stores it. The accumulator is there twice, so an item is stored while the next
is multiplied. Reading weights bounds it with few rows (54 KB per SM and microsecond: `stages` hold 160 KB and more),
tcgen05 with many (128 x 256 tiles of one SM; pairs of SMs, which share the rows, are left for when a chip is at hand).

Operands. A product arrives at `free` of its slot by itself, when tcgen05 has read it: TMA refills no slot before that.
The last product of an item is followed by a commit that arrives at `done` of its accumulator, after all before it;
the storing warpgroup arrives at `stored` after its last read of an accumulator has ended (`wait_load_tmem`), and the
first product of the item after next waits for that. Staged output is rewritten only after TMA has read it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from ..dispatch import Platform
from ..mosaic import LINE_BYTES, swizzled
from .contract import MatmulProblem, QuantizedWeight
from .formats import quantize_rows
from .row_tiles import STAGED_BYTES, Item, Items, Sizes, drain, is_fp8, operands, scaled, store_rows, stored_as

ROW_TILES = (16, 32, 64, 128, 256)
CHANNELS = 128  # lanes of tensor memory
_LOADS, _MULTIPLIES, _STORES = range(3)  # the warpgroups


def unsupported(problem: MatmulProblem) -> str | None:
    """Why this file cannot serve a linear layer. Plain weights are left to cuBLAS, which has nothing to fuse."""
    if problem.format is None or not is_fp8(problem.format):
        return f"weights must be fp8 with a scale for each channel, not {getattr(problem.format, 'name', 'plain')}"
    return misfit(problem.in_dim, problem.out_dim, problem.dtype, 1)


def misfit(in_dim: int, out_dim: int, dtype: str, item_bytes: int) -> str | None:
    """Why a weight [out, in] of so many bytes a number, or activations of a dtype, do not fit the kernel."""
    if dtype != "bfloat16":
        return f"activations must be bfloat16, not {dtype}"
    inputs = LINE_BYTES // item_bytes
    if out_dim % CHANNELS or in_dim % inputs:
        return f"out must be a multiple of {CHANNELS} and in of {inputs}, not {out_dim} and {in_dim}"
    return None


def matmul(
    x: Float[Array, "*rows in"],
    weight: QuantizedWeight,
    *,
    platform: Platform,
    out_dtype: DTypeLike,
    device_kind: str,
    sizes: Sizes | None = None,
    interpret: Any = None,
) -> Float[Array, "*rows out"]:
    """See the contract: all rows are one group. `sizes` are the tuned ones if None."""
    del platform
    rows = x.reshape(-1, x.shape[-1])
    if sizes is None:
        tile_rows = next((n for n in ROW_TILES if n >= rows.shape[0]), ROW_TILES[-1])
        sizes = Sizes.of("quantized_matmul", device_kind, "float8_e4m3fn", tile_rows)
    values, row_scales = quantize_rows(rows, "float8_e4m3fn")
    output = multiply_groups(
        values,
        weight.values[None],
        jnp.full((1,), rows.shape[0], jnp.int32),
        (row_scales[:, 0], weight.scales[None, :, 0]),
        sizes=sizes,
        out_dtype=jnp.dtype(out_dtype),
        interpret=interpret,
    )
    return output.reshape(*x.shape[:-1], -1)


def multiply_groups(
    x: Shaped[Array, "M in"],
    weight: Shaped[Array, "E out in"],
    group_sizes: Int32[Array, " E"],
    scales: tuple[Float[Array, " M"], Float[Array, "E out"]] | None,
    *,
    sizes: Sizes,
    out_dtype: jnp.dtype,
    interpret: Any = None,
) -> Float[Array, "M out"]:
    """Row m times the transposed weight of its group, and both scales; x and weight are of one dtype."""
    (num_rows, _), out_dim = x.shape, weight.shape[1]
    if not num_rows:
        return jnp.zeros((0, out_dim), out_dtype)
    stored_dtype = stored_as(out_dtype)
    line = LINE_BYTES // x.dtype.itemsize
    staged_rows = min(sizes.rows, 64, STAGED_BYTES // (CHANNELS * stored_dtype.itemsize))
    kernel = plgpu.kernel(
        functools.partial(_body, sizes=sizes, line=line, is_scaled=scales is not None),
        out_type=jax.ShapeDtypeStruct((num_rows, out_dim), stored_dtype),
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            swizzled((sizes.stages, sizes.rows, line), x.dtype),
            swizzled((sizes.stages, CHANNELS, line), x.dtype),
            plgpu.SMEM((staged_rows, CHANNELS), stored_dtype),
            plgpu.TMEM((CHANNELS, 2 * sizes.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=sizes.stages),
            plgpu.Barrier(num_barriers=sizes.stages, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=2, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=2, orders_tensor_core=True),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="matmul_blackwell",
    )
    output: jax.Array = kernel(*operands(x, weight, group_sizes, scales, sizes.rows))
    return output.astype(out_dtype)


def _body(
    tiles: Any, num_tiles: Any, x: Any, weight: Any, *refs: Any, sizes: Sizes, line: int, is_scaled: bool
) -> None:
    scales = refs[:2] if is_scaled else None
    out, x_tile, weight_tile, staged, sums, full, free, done, stored = refs[2 if is_scaled else 0 :]
    # x_tile [stages, rows, line], weight_tile [stages, CHANNELS, line]
    # staged [rows, CHANNELS], sums [CHANNELS, 2 * rows]
    num_groups, out_dim, in_dim = weight.shape
    items = Items(tiles, num_tiles[0], num_groups, out_dim // CHANNELS, pl.cdiv(in_dim, line), sizes)
    warpgroup = lax.axis_index("warpgroup")

    def accumulator(item: Item) -> tuple[jax.Array, jax.Array]:
        """Which of the two, and how often it was used before: every item that has steps has as many."""
        index = lax.div(item.steps_before, items.num_steps)
        return lax.rem(index, 2), lax.div(index, 2)

    def load(item: Item) -> None:
        @pl.loop(0, item.steps)
        def _(k: jax.Array) -> None:
            slot, inputs = lax.rem(item.steps_before + k, sizes.stages), pl.ds(k * line, line)

            @pl.when(item.steps_before + k >= sizes.stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            channels = pl.ds(item.out_tile * CHANNELS, CHANNELS)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(item.start, sizes.rows), inputs], x_tile.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(weight.at[item.group, channels, inputs], weight_tile.at[slot], full.at[slot])

    def multiply(item: Item) -> None:
        which, num_uses = accumulator(item)

        @pl.when((item.steps > 0) & (num_uses > 0))
        def _() -> None:
            plgpu.barrier_wait(stored.at[which])

        @pl.loop(0, item.steps)
        def _(k: jax.Array) -> None:
            slot = lax.rem(item.steps_before + k, sizes.stages)
            plgpu.barrier_wait(full.at[slot])
            plgpu.tcgen05_mma(
                sums.at[:, pl.ds(which * sizes.rows, sizes.rows)],
                weight_tile.at[slot],
                x_tile.at[slot].transpose((1, 0)),
                free.at[slot],
                accumulate=k > 0,
            )

        @pl.when(item.steps > 0)
        def _() -> None:
            plgpu.tcgen05_commit_arrive(done.at[which])

    def store(item: Item) -> None:
        which, channels = accumulator(item)[0], pl.ds(item.out_tile * CHANNELS, CHANNELS)
        layout, num_staged = plgpu.Layout.TCGEN05, staged.shape[0]

        def put(first: int, piece: jax.Array) -> None:
            store_rows(piece, staged, out, item.start + first, item.own, channels, plgpu.Layout.TCGEN05_TRANSPOSED)

        @pl.when(item.steps > 0)
        def _() -> None:
            plgpu.barrier_wait(done.at[which])
            for first in range(0, sizes.rows, num_staged):
                columns = sums.at[:, pl.ds(which * sizes.rows + first, num_staged)]
                piece = plgpu.async_load_tmem(columns, layout=layout)
                if scales is not None:
                    by_row = scales[0].at[pl.ds(item.start + first, num_staged)]
                    piece = scaled(piece, by_row, scales[1].at[item.group, channels], layout)
                put(first, piece)
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(stored.at[which])

        @pl.when(item.steps == 0)  # rows of no group: the next item's product may be under way in this accumulator
        def _() -> None:
            for first in range(0, sizes.rows, num_staged):
                put(first, plgpu.layout_cast(jnp.zeros((CHANNELS, num_staged), jnp.float32), layout))

    @pl.when(warpgroup == _LOADS)
    def _() -> None:
        drain(free, items.visit(load), sizes.stages)

    @pl.when(warpgroup == _MULTIPLIES)
    def _() -> None:
        drain(stored, lax.div(items.visit(multiply), items.num_steps), 2)

    @pl.when(warpgroup == _STORES)
    def _() -> None:
        items.visit(store)
        plgpu.wait_smem_to_gmem(0)
