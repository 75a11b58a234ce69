"""Matmul of 8-bit weights and 8-bit activations for Hopper: TMA, wgmma (e4m3 to float32, or s8 to s32), scales last.

Schedule. Both operands run along K in shared memory, so either may be M. Many rows of activations are M: a block has
two consumer warpgroups of 64 rows x 256 channels, whose accumulator is half of their registers, and a cluster of two
blocks multicasts the weights, since 128 x 256 x 128 bytes of operands per 0.5 us and SM are more than L2 gives. Up to
128 rows are N and the weights M (64 channels a warpgroup): no padding to 64 rows, and the output is stored transposed.
One more warpgroup keeps `stages` of both operands in flight with TMA and runs ahead over the ends of tiles, so the
next tile's operands arrive during an epilogue. Tiles go out in panels of 8 along M, which keeps what runs at once in
L2. wgmma bounds it with many rows; with few, reading weights: at least 90 KB per SM are in flight (36 KB per SM and
microsecond keep 4.8 TB/s busy), which also lets the SMs of a last, half empty wave read faster. Where there are
too few tiles to fill the chip K is split, and XLA adds the float32 parts in whatever reads them.

Several weights of the same activations (q, k and v; gate and up) share a launch: tiles are numbered over all of their
channels, so one wave instead of several is partly empty, and one pipeline fills and drains. Each weight has whole
tiles; whose a tile is, is a branch around its copies, in and out. Blocks of a cluster multicast one tile of N, so they
take the same branch there; along M, where nothing is multicast, each takes its own.

Scales. Products are exact in their accumulator but for fp8's 14 bits; both scales come in with a tile's last stage and
are multiplied in float32. Quantizing a row of activations needs its maximum before the first product: XLA does it, in
the fusion that computes the row (a norm, an activation), where it costs no pass over memory of its own.

Operands. A slot is refilled only after every consumer (of the cluster) arrived at `free`. A consumer arrives for step
k-1 after `wgmma_wait(1)` behind the wgmma of step k, which leaves only that one in flight; for a tile's last step after
the accumulator was read, which waits for all. Staged output is rewritten once its TMA store has read it
(`wait_smem_to_gmem`, by the warpgroup that issued it and whose own room it is); the scales' slot is a ring of one, read
by plain loads before the `commit_smem` of the staged output, behind which it is released. Of a branch's copies exactly
one is issued, by the thread that would without it: arrivals and stores are counted as ever.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ..mosaic import LINE_BYTES, swizzled
from .hopper_tiles import (
    Parts,
    Ring,
    Tile,
    Tiles,
    along_columns,
    along_rows,
    free_barrier,
    full_barrier,
    launch,
    shared_by,
)


class Operand(NamedTuple):
    """Rows of M or N, and what each is scaled by."""

    values: Shaped[Array, "rows K"]
    scales: Float[Array, " rows"]


def products(
    rows: Operand, weights: Sequence[Operand], *, tile: Tile, out_dtype: DTypeLike, interpret: Any = None
) -> Sequence[jax.Array]:
    """[M, N] of out_dtype for each of some weights, which are N; the tile divides every operand and has no splits."""
    num_rows = rows.values.shape[0]
    return _launch(
        [rows],
        weights,
        tile=tile,
        parts=(),
        out=[jax.ShapeDtypeStruct((num_rows, weight.values.shape[0]), out_dtype) for weight in weights],
        staged=_staged(tile, out_dtype),
        interpret=interpret,
    )


def products_in_parts(
    weights: Sequence[Operand], rows: Operand, *, tile: Tile, out_dtype: DTypeLike, interpret: Any = None
) -> Sequence[jax.Array]:
    """[splits, N, M] for each of some weights, which are M: parts to add, of out_dtype, or float32 and without scales
    if several; the tile divides every operand."""
    parts = [Parts(_tiles([weight], [rows], tile), out_dtype) for weight in weights]
    stored = _launch(
        weights,
        [rows],
        tile=tile,
        parts=parts,
        out=[each.out for each in parts],
        staged=parts[0].staged,
        interpret=interpret,
    )
    return [each.by_rows(output) for each, output in zip(parts, stored, strict=True)]


def _tiles(m: Sequence[Operand], n: Sequence[Operand], tile: Tile) -> Tiles:
    num_m, num_n = (sum(operand.values.shape[0] for operand in side) for side in (m, n))
    return Tiles(tile, num_m, num_n, m[0].values.shape[1])


def _launch(
    m: Sequence[Operand], n: Sequence[Operand], *, tile: Tile, parts: Sequence[Parts],
    out: Sequence[jax.ShapeDtypeStruct], staged: Any, interpret: Any,
) -> Sequence[jax.Array]:  # fmt: skip
    tiles = _tiles(m, n, tile)
    stored: Sequence[jax.Array] = launch(
        functools.partial(_body, num_m=len(m), num_n=len(n), tiles=tiles, parts=parts),
        tiles,
        [array for operand in (*m, *n) for array in operand],
        out=tuple(out),
        scratch=_scratch(tile, m[0].values.dtype) | {"staged": staged},
        name="matmul_w8a8_hopper",
        interpret=interpret,
    )
    return stored


def _staged(tile: Tile, dtype: DTypeLike) -> Any:
    """Of each consumer warpgroup two lines of its rows of the output: wider numbers must not take more room."""
    return swizzled((tile.warpgroups, 2, tile.m, LINE_BYTES // jnp.dtype(dtype).itemsize), dtype)


def _scratch(tile: Tile, dtype: DTypeLike) -> dict[str, Any]:
    return {
        "m_smem": swizzled((tile.stages, tile.block_m, tile.k), dtype),
        "n_smem": swizzled((tile.stages, tile.n, tile.k), dtype),
        "scales_smem": (plgpu.SMEM((tile.block_m,), jnp.float32), plgpu.SMEM((tile.n,), jnp.float32)),
        "barriers": (full_barrier(tile.stages, 2), free_barrier(tile, tile.stages, is_shared=True)),
        "scales_barriers": (full_barrier(1, 2), free_barrier(tile, 1)),
    }


@dataclasses.dataclass(frozen=True)
class _Side:
    """M or N: the refs of its operands, which lie there one behind the other; each holds whole tiles."""

    values: Sequence[Any]  # [rows, K]
    scales: Sequence[Any]  # [rows]

    @classmethod
    def of(cls, refs: Sequence[Any]) -> "_Side":
        """Of values and scales in turn."""
        return cls(refs[::2], refs[1::2])

    def at(self, place: jax.Array, body: Callable[[int, jax.Array], None]) -> None:
        """body(operand's number, place in it) for the operand that holds a place: a branch for each, if several."""
        if len(self.values) == 1:
            body(0, place)
            return
        first = 0
        for number, values in enumerate(self.values):
            end = first + values.shape[0]
            pl.when((place >= first) & (place < end))(functools.partial(body, number, place - first))
            first = end

    def copy_values(
        self, place: jax.Array, inputs: Any, smem: Any, full: Any, collective_axes: str | None = None
    ) -> None:
        """Those of a tile's rows, for so many inputs."""

        def copy(number: int, row: jax.Array) -> None:
            values = self.values[number].at[pl.ds(row, smem.shape[0]), inputs]
            plgpu.copy_gmem_to_smem(values, smem, full, collective_axes=collective_axes)

        self.at(place, copy)

    def copy_scales(self, place: jax.Array, smem: Any, full: Any) -> None:
        """Those of a tile's rows."""

        def copy(number: int, row: jax.Array) -> None:
            plgpu.copy_gmem_to_smem(self.scales[number].at[pl.ds(row, smem.shape[0])], smem, full)

        self.at(place, copy)


def _body(
    *refs: Any,  # values and scales of each operand of M, then of N: [rows, K] and [rows]; outputs [M, N], or parts
    num_m: int,
    num_n: int,
    tiles: Tiles,
    parts: Sequence[Parts],
    **scratch: Any,
) -> None:
    """One block: the last warpgroup copies, the others multiply."""
    tile = tiles.tile
    m_side, n_side = _Side.of(refs[: 2 * num_m]), _Side.of(refs[2 * num_m :][: 2 * num_n])
    outputs = refs[2 * (num_m + num_n) :]
    ring = Ring(tile.stages, *scratch["barriers"])
    scales_ring = Ring(1, *scratch["scales_barriers"]) if tile.splits == 1 else None
    m_smem, n_smem, (m_scales_smem, n_scales_smem) = scratch["m_smem"], scratch["n_smem"], scratch["scales_smem"]
    wg = lax.axis_index("wg")

    @pl.when(wg == tile.warpgroups)
    def _() -> None:
        def fill(turn: jax.Array, index: jax.Array) -> None:
            split, m, n = tiles.at(index)

            @pl.loop(0, tiles.steps)
            def _(step: jax.Array) -> None:
                slot, full = ring.to_fill(turn * tiles.steps + step)
                inputs = pl.ds((split * tiles.steps + step) * tile.k, tile.k)
                m_side.copy_values(m, inputs, m_smem.at[slot], full)
                n_side.copy_values(n, inputs, n_smem.at[slot], full, shared_by(tile))

            if scales_ring is not None:
                full = scales_ring.to_fill(turn)[1]
                m_side.copy_scales(m, m_scales_smem, full)
                n_side.copy_scales(n, n_scales_smem, full)

        tiles.each(fill)
        ring.drain(tiles.num_turns() * tiles.steps)
        if scales_ring is not None:
            scales_ring.drain(tiles.num_turns())

    @pl.when(wg < tile.warpgroups)
    def _() -> None:
        rows, staged = pl.ds(wg * tile.m, tile.m), scratch["staged"].at[wg]

        def multiply(turn: jax.Array, index: jax.Array) -> None:
            split, m, n = tiles.at(index)
            sums = _sums(ring, turn * tiles.steps, tiles, m_smem.at[:, rows], n_smem)
            m = m + wg * tile.m
            if scales_ring is not None:
                scales_ring.wait_full(turn)
                sums = sums * along_columns(m_scales_smem[rows], sums.shape)
            if parts:
                if scales_ring is not None:
                    sums = sums * along_rows(n_scales_smem[...], sums.shape)
                parts[0].stage(sums, staged)
                m_side.at(m, lambda number, row: parts[number].send(staged, outputs[number], split, row, n))
            else:
                _store(sums, n_scales_smem, staged, outputs, n_side, m, n)
            if scales_ring is not None:
                scales_ring.release(turn)

        tiles.each(multiply)
        plgpu.wait_smem_to_gmem(0)


def _sums(ring: Ring, first_use: jax.Array, tiles: Tiles, m_smem: Any, n_smem: Any) -> jax.Array:
    """One tile's products [m, n] in float32; m_smem is [stages, m, k], n_smem [stages, n, k]."""
    tile = tiles.tile
    accumulator = jnp.int32 if m_smem.dtype == jnp.int8 else jnp.float32

    def run(sums: Any) -> jax.Array:
        @pl.loop(0, tiles.steps)
        def _(step: jax.Array) -> None:
            slot = ring.to_read(first_use + step)
            plgpu.wgmma(sums, m_smem.at[slot], n_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _() -> None:
                ring.release(first_use + step - 1)

        done: jax.Array = sums[...].astype(jnp.float32)
        ring.release(first_use + tiles.steps - 1)
        return done

    whole: jax.Array = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((tile.m, tile.n), accumulator))
    return whole


def _store(
    sums: jax.Array, n_scales: Any, staged: Any, outputs: Sequence[Any], n_side: _Side, m: jax.Array, n: jax.Array
) -> None:
    """Scale and store a tile [m, n] as wide as `staged` at a time, one part on its way while the next is made."""
    (rows, columns), width = sums.shape, staged.shape[-1]
    for part, first in enumerate(range(0, columns, width)):
        scaled = sums[:, first : first + width] * along_rows(n_scales[pl.ds(first, width)], (rows, width))
        plgpu.wait_smem_to_gmem(min(part, 1), wait_read_only=True)  # all, before the first: parts may be odd
        staged[part % 2] = scaled.astype(staged.dtype)
        plgpu.commit_smem()

        def send(number: int, column: jax.Array, part: int = part, first: int = first) -> None:
            to = outputs[number].at[pl.ds(m, rows), pl.ds(column, columns)]
            plgpu.copy_smem_to_gmem(staged.at[part % 2], to.at[:, pl.ds(first, width)])

        n_side.at(n, send)
