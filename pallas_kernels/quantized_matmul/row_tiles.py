"""What the Mosaic GPU kernels of matmuls over groups of rows share: work lists, persistent blocks, ragged stores."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from ..mosaic import TILED_ROWS, store
from ..tuning import tuned
from .contract import WeightFormat

STAGED_BYTES = 32 * 1024  # of output in shared memory, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tile sizes, of which `rows` follows the problem and the others are tuned for it."""

    rows: int  # of a tile, at most
    channels: int  # output channels of one warpgroup
    stages: int
    panel: int  # tiles of output channels that run side by side
    blocks: int  # persistent ones

    @classmethod
    def of(cls, operation: str, device_kind: str, dtype: DTypeLike, rows: int) -> "Sizes":
        """The tuned ones of an operation for tiles of so many rows, of operands of a dtype."""
        return cls(rows=rows, **tuned(operation, device_kind, f"{jnp.dtype(dtype).name}_{rows}"))


def is_fp8(format: WeightFormat) -> bool:
    """Whether both operands are float8 with scales that a whole channel and a whole row share."""
    is_by_channel = format.group is None and format.block_rows == 1 and not format.global_scale
    return is_by_channel and format.storage == format.activations == "float8_e4m3fn"


def mean_tile_rows(num_rows: int, num_groups: int, choices: Sequence[int], *, most_before: int = 0) -> int:
    """Of the choices, about twice the mean rows of a group: groups differ, and a second tile reads weights again.

    The mean rows have room in one tile after as many as `most_before` rows of others.
    """
    wanted = max(2 * num_rows, num_rows + most_before * num_groups)
    return next((rows for rows in choices if rows * num_groups >= wanted), choices[-1])


def work_list(
    group_sizes: Int32[Array, " E"], num_rows: int, tile_rows: int
) -> tuple[Int32[Array, "4 tiles"], Int32[Array, " 1"]]:
    """The tiles of rows: group, where the tile begins, and where its own rows begin and end; and how many there are.

    Tiles begin at multiples of TILED_ROWS, so that a group's first tile may begin with rows of groups before. The rows
    beyond all groups are a last group of their own, number E.
    """
    sizes = jnp.concatenate([group_sizes, num_rows - jnp.sum(group_sizes, keepdims=True)]).astype(jnp.int32)
    num_groups = sizes.shape[0]
    row_ends = jnp.cumsum(sizes)
    row_starts = row_ends - sizes
    group_starts = row_starts // TILED_ROWS * TILED_ROWS
    num_tiles = jnp.where(sizes > 0, (row_ends - group_starts + tile_rows - 1) // tile_rows, 0)
    tile_ends = jnp.cumsum(num_tiles)
    most_added = TILED_ROWS - 1 + tile_rows - 1  # to a group's rows, before them and after
    tile = jnp.arange(min(num_rows, (num_rows + num_groups * most_added) // tile_rows), dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, tile, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    start = group_starts[group] + (tile - tile_ends[group] + num_tiles[group]) * tile_rows
    first, end = jnp.maximum(start, row_starts[group]), jnp.minimum(start + tile_rows, row_ends[group])
    return jnp.stack([group, start, first, end]), tile_ends[-1:]


def operands(
    x: Shaped[Array, "M in"],
    weight: Shaped[Array, "E out in"],
    group_sizes: Int32[Array, " E"],
    scales: tuple[Float[Array, " M"], Float[Array, "E out"]] | None,
    tile_rows: int,
) -> list[jax.Array]:
    """What a kernel is called with: the work list, x and weight, and their scales if there are any."""
    num_rows = x.shape[0]
    # TMA copies whole tiles of 8 rows and a line; only tiles as a whole may lie beyond the array.
    padded = jnp.pad(x, ((0, -num_rows % TILED_ROWS), (0, 0)))
    arrays = [*work_list(group_sizes, num_rows, tile_rows), padded, weight]
    if scales is not None:
        # A tile's rows may reach past the last one; TMA fills x with zeros there, but scales are plain loads.
        arrays += [jnp.pad(scales[0], (0, tile_rows)), scales[1]]
    return arrays


def stored_as(out_dtype: jnp.dtype) -> jnp.dtype:
    """What a kernel stores for an output: its own dtype where it can, or float32, which XLA then rounds."""
    return out_dtype if out_dtype in (jnp.bfloat16, jnp.float16, jnp.float32) else jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Item:
    """A tile of rows of one group times a tile of output channels. All are traced scalars."""

    steps_before: jax.Array  # of this block's items before
    steps: jax.Array  # along `in`; 0 for rows beyond all groups, whose products are zeros
    group: jax.Array
    start: jax.Array  # the tile's first row, a multiple of TILED_ROWS
    own: tuple[jax.Array, jax.Array]  # the first row of its group, and the end of those
    out_tile: jax.Array


@dataclasses.dataclass(frozen=True)
class Items:
    """The items that the persistent block "block" turns to, panels of output channels outermost."""

    tiles: Any  # a ref [4, tiles]
    num_tiles: jax.Array
    num_groups: int
    num_out: int  # tiles of output channels
    num_steps: int
    sizes: Sizes

    def visit(self, fn: Callable[[Item], None]) -> jax.Array:
        """Calls fn for every item in turn; the steps of all of them."""
        num_items = self.num_tiles * self.num_out
        block, blocks = lax.axis_index("block"), self.sizes.blocks

        def one(turn: jax.Array, steps_before: jax.Array) -> jax.Array:
            item = block + turn * blocks
            first = lax.div(item, self.num_tiles * self.sizes.panel) * self.sizes.panel
            width = jnp.minimum(self.sizes.panel, self.num_out - first)
            rest = item - first * self.num_tiles
            tile = lax.div(rest, width)
            group, start, *own = (self.tiles[part, tile] for part in range(4))
            steps = jnp.where(group < self.num_groups, self.num_steps, 0)
            group = jnp.minimum(group, self.num_groups - 1)
            fn(Item(steps_before, steps, group, start, (own[0], own[1]), first + lax.rem(rest, width)))
            return steps_before + steps

        steps: jax.Array = lax.fori_loop(0, lax.div(num_items - block + blocks - 1, blocks), one, jnp.int32(0))
        return steps


def drain(freed: Any, uses: jax.Array, num_slots: int) -> None:
    """Wait for the last arrivals at the slots of a ring that was used so often: none comes after the block's end.

    Who fills a ring waits before each use but a slot's first, which leaves the last of every slot.
    """
    for slot in range(num_slots):

        @pl.when(uses + slot >= num_slots)
        def _(slot: int = slot) -> None:
            plgpu.barrier_wait(freed.at[lax.rem(uses + slot, num_slots)])


def scaled(piece: jax.Array, row_scales: Any, channel_scales: Any, layout: Any) -> jax.Array:
    """[channels, rows] times both scales, which lie in global memory; `layout` is that of the piece."""
    for axis, scales in ((1, row_scales), (0, channel_scales)):
        one = plgpu.load(scales, layout=layout.reduce(1 - axis), optimized=False)
        piece = piece * plgpu.layout_cast(lax.broadcast_in_dim(one, piece.shape, (axis,)), layout)
    return piece


def store_rows(
    piece: jax.Array, staged: Any, out: Any, start: jax.Array, own: tuple[jax.Array, jax.Array], channels: Any,
    transposed: Any,
) -> None:  # fmt: skip
    """A piece [channels, rows] that begins at row `start`, transposed through `staged` [rows, channels], to `out`.

    `transposed` is the layout of the piece whose pairs lie along channels. Stored are the rows that are its item's
    own: all in one TMA store, or fewer one by one. `staged` is not tiled, so that they may begin anywhere. The
    warpgroup that calls waits for its own earlier stores to have read `staged`.
    """
    num_staged = staged.shape[0]
    first, end = (jnp.clip(row - start, 0, num_staged) for row in own)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    piece = piece.astype(staged.dtype)
    if staged.dtype == jnp.float32:  # stmatrix transposes 16 bits only
        piece = plgpu.layout_cast(piece, transposed)
    store(staged.transpose((1, 0)), piece)
    plgpu.commit_smem()

    @pl.when(end - first == num_staged)
    def _() -> None:
        plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(start, num_staged), channels])

    @pl.when(end - first < num_staged)
    def _() -> None:
        @pl.loop(first, end)
        def _(row: jax.Array) -> None:
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, 1)], out.at[pl.ds(start + row, 1), channels])
