"""What the Hopper matmuls share: tiles and their order, rings of shared memory, launching.

A matmul is M x K times N x K in wgmma's letters. Which of weights and activations is M differs: few rows of activations
are N, whose tiles may be as narrow as 8; M's are 64.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ..mosaic import BY_COLUMN, BY_ROW


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a block computes at a time; all but `splits` is tuned."""

    m: int  # of a consumer warpgroup
    n: int
    k: int  # of a stage
    stages: int
    warpgroups: int  # that multiply, one below the other along M; one more copies
    cluster: int = 1  # blocks, one below the other along M, that share N's tiles by multicast
    pieces: int = 1  # in which N's part of a stage comes
    n_slots: int = 0  # that these pieces have, if not those of `stages`
    blocks: int = 132  # persistent ones
    panel: int = 8  # tiles of M that run side by side
    turns: int = 1  # tiles that a block computes at least, by splits of K: many and small ones spread evenly
    ahead: int = 0  # operands, 0 or 1, of a stage that are decoded during the last product of the stage before
    splits: int = 1  # parts of K that are computed apart and added by XLA

    @property
    def block_m(self) -> int:
        """Of all consumer warpgroups."""
        return self.m * self.warpgroups

    @property
    def num_n_slots(self) -> int:
        """Of N's ring, where it has one of its own."""
        return self.n_slots or self.stages * self.pieces

    def fitted(self, m: int, n: int, k_parts: int) -> "Tile":
        """With a cluster that divides M, and as many splits as fill the blocks and divide K's smallest parts."""
        most = min(self.filling_splits(m, n), k_parts)
        splits = max(parts for parts in range(1, most + 1) if k_parts % parts == 0)
        return dataclasses.replace(self, cluster=math.gcd(m // self.block_m, self.cluster), splits=splits)

    def filling_splits(self, m: int, n: int) -> int:
        """As many as fill the blocks."""
        return max(1, self.blocks * self.turns // (m // self.block_m * (n // self.n)))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one matmul, numbered so that those which run at the same time share operands in L2."""

    tile: Tile
    m: int
    n: int
    k: int

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return self.k // (self.tile.k * self.tile.splits)

    @property
    def shape(self) -> tuple[int, int]:
        """Tiles of a cluster along M and along N."""
        return self.m // (self.tile.block_m * self.tile.cluster), self.n // self.tile.n

    @property
    def count(self) -> int:
        """Tiles of a cluster, all splits together."""
        return math.prod(self.shape) * self.tile.splits

    @property
    def blocks(self) -> int:
        """Clusters that run."""
        return min(max(1, self.tile.blocks // self.tile.cluster), self.count)

    def at(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Split, first M and first N of this block's part of a cluster's tile."""
        here, apart = lax.rem(index, math.prod(self.shape)), lax.div(index, math.prod(self.shape))
        down, across = plgpu.planar_snake(here, self.shape, 0, self.tile.panel)
        down = down * self.tile.cluster + lax.axis_index("peer")
        return apart, down * self.tile.block_m, across * self.tile.n

    def first_channel(self, m: jax.Array, n: jax.Array) -> jax.Array:
        """The row of the weights that belongs to M's place m, in the tile of N that begins at n."""
        return m

    def num_turns(self) -> jax.Array:
        """Tiles that this block computes."""
        return lax.div(self.count - lax.axis_index("sm") + self.blocks - 1, self.blocks)

    def each(self, body: Callable[[jax.Array, jax.Array], None]) -> None:
        """body(turn, index) for all tiles of this block."""

        @plgpu.nd_loop((self.count,), collective_axes="sm")
        def _(loop: Any) -> None:
            body(loop.local_index, loop.index[0])


@dataclasses.dataclass(frozen=True)
class GroupTiles(Tiles):
    """Tiles of N that have weights each, [groups * M, K]; of N only the first tiles are in use.

    `static` are the same tiles as if all were, and what is launched.
    """

    static: Tiles
    groups: Any  # of each tile of N, a ref
    num_n: jax.Array

    @property
    def count(self) -> Any:
        """Tiles in use, traced."""
        return self.static.shape[0] * self.num_n

    @property
    def blocks(self) -> int:
        """Clusters that run."""
        return self.static.blocks

    def at(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tiles of N side by side, for those of one group share weights."""
        down = lax.div(index, self.num_n) * self.tile.cluster + lax.axis_index("peer")
        return jnp.int32(0), down * self.tile.block_m, lax.rem(index, self.num_n) * self.tile.n

    def first_channel(self, m: jax.Array, n: jax.Array) -> jax.Array:
        """Of the tile's group."""
        # A product, of which the compiler sees that it begins at whole tiles.
        first: jax.Array = self.groups[lax.div(n, self.tile.n)] * self.m + m
        return first


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory that one warpgroup fills and others empty, over and over; uses are counted from 0."""

    slots: int
    full: Any  # Barrier [slots]
    free: Any  # Barrier [slots]

    def slot(self, use: jax.Array) -> jax.Array:
        """Of a use."""
        return lax.rem(use, self.slots)

    def to_fill(self, use: jax.Array) -> tuple[jax.Array, Any]:
        """The slot, once it is free, and the barrier for copies into it."""

        @pl.when(use >= self.slots)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[self.slot(use)])

        return self.slot(use), self.full.at[self.slot(use)]

    def wait_full(self, use: jax.Array) -> None:
        """Wait until the slot has been filled."""
        plgpu.barrier_wait(self.full.at[self.slot(use)])

    def to_read(self, use: jax.Array) -> jax.Array:
        """The slot, once it is full."""
        self.wait_full(use)
        return self.slot(use)

    def release(self, use: jax.Array) -> None:
        """This warpgroup has read the slot."""
        plgpu.barrier_arrive(self.free.at[self.slot(use)])

    def drain(self, uses: jax.Array) -> None:
        """Wait until the slots of so many uses are free: nobody arrives here after the block's end."""
        for slot in range(self.slots):
            self.to_fill(uses + slot)


def full_barrier(slots: int, copies: int) -> Any:
    """The `full` of a ring whose slots are filled by so many copies."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=slots)


def free_barrier(tile: Tile, slots: int, *, is_shared: bool = False) -> Any:
    """The `free` of a ring that all consumers empty, where `is_shared` those of the cluster."""
    if is_shared and tile.cluster > 1:
        return plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=tile.warpgroups, num_barriers=slots)
    return plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=slots)


def shared_by(tile: Tile) -> str | None:
    """The axis along which copies of N are multicast, if any."""
    return "peer" if tile.cluster > 1 else None


def along_rows(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each column, repeated over the rows."""
    return lax.broadcast_in_dim(plgpu.layout_cast(columns, BY_COLUMN), shape, (1,))


def along_columns(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each row, repeated over the columns."""
    return lax.broadcast_in_dim(plgpu.layout_cast(rows, BY_ROW), shape, (0,))


class Parts:
    """The output of a matmul whose weights are M: parts of K apart, to be added.

    16-bit ones are stored transposed, through shared memory; Mosaic has no such store for float32, which XLA turns.
    """

    def __init__(self, tiles: Tiles, out_dtype: DTypeLike) -> None:
        """Of several parts, all are float32."""
        self._tiles = tiles
        self.dtype = jnp.dtype(jnp.float32 if tiles.tile.splits > 1 else out_dtype)
        self._is_turned = self.dtype.itemsize == 2

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """What the kernel returns."""
        sides = (self._tiles.n, self._tiles.m) if self._is_turned else (self._tiles.m, self._tiles.n)
        return jax.ShapeDtypeStruct((self._tiles.tile.splits, *sides), self.dtype)

    @property
    def staged(self) -> Any:
        """Shared memory in which each consumer warpgroup makes its part of a tile."""
        tile = self._tiles.tile
        sides = (tile.n, tile.m) if self._is_turned else (tile.m, tile.n)
        return plgpu.SMEM((tile.warpgroups, *sides), self.dtype)

    def store(self, sums: jax.Array, staged: Any, out_gmem: Any, split: jax.Array, m: jax.Array, n: jax.Array) -> None:
        """Store products [m, n] that begin at m and n; `staged` is this warpgroup's."""
        self.stage(sums, staged)
        self.send(staged, out_gmem, split, m, n)

    def stage(self, sums: jax.Array, staged: Any) -> None:
        """Write products [m, n] to `staged`, once TMA has read what was there."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        into = staged.transpose((1, 0)) if self._is_turned else staged
        into[...] = sums.astype(self.dtype)
        plgpu.commit_smem()

    def send(self, staged: Any, out_gmem: Any, split: jax.Array, m: jax.Array, n: jax.Array) -> None:
        """Copy what was staged to where it begins at m and n."""
        tile = self._tiles.tile
        down, across = pl.ds(m, tile.m), pl.ds(n, tile.n)
        to = out_gmem.at[split, across, down] if self._is_turned else out_gmem.at[split, down, across]
        plgpu.copy_smem_to_gmem(staged, to)

    def by_rows(self, stored: jax.Array) -> jax.Array:
        """What the kernel returned as [splits, N, M]."""
        return stored if self._is_turned else stored.transpose(0, 2, 1)


def launch(
    body: Callable[..., None],
    tiles: Tiles,
    operands: Sequence[jax.Array],
    *,
    out: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    scratch: Mapping[str, Any],
    name: str,
    interpret: Any,
) -> Any:
    """Run `body` over the tiles: it gets the operands, the outputs and, by name, the scratch; `name` is for profiles.

    What it gives is an array, or several, as `out` is.
    """
    run = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=dict(scratch),
        grid=(tiles.blocks,),
        grid_names=("sm",),
        cluster=(tiles.tile.cluster,),
        cluster_names=("peer",),
        num_threads=tiles.tile.warpgroups + 1,
        thread_name="wg",
        kernel_name=name,
        **({"interpret": interpret} if interpret else {}),
    )
    return run(*operands)
