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

Scales. Products are exact in their accumulator but for fp8's 14 bits; both scales come in with a tile's last stage and
are multiplied in float32. Quantizing a row of activations needs its maximum before the first product: XLA does it, in
the fusion that computes the row (a norm, an activation), where it costs no pass over memory of its own.

Operands. A slot is refilled only after every consumer (of the cluster) arrived at `free`. A consumer arrives for step
k-1 after `wgmma_wait(1)` behind the wgmma of step k, which leaves only that one in flight; for a tile's last step after
the accumulator was read, which waits for all. Staged output is rewritten once its TMA store has read it
(`wait_smem_to_gmem`, by the warpgroup that issued it and whose own room it is); the scales' slot is a ring of one.
"""

import functools
from typing import Any

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


def product(
    m_values: Shaped[Array, "M K"],
    n_values: Shaped[Array, "N K"],
    m_scales: Float[Array, " M"],
    n_scales: Float[Array, " N"],
    *,
    tile: Tile,
    out_dtype: DTypeLike,
    interpret: Any = None,
) -> jax.Array:
    """[M, N] of out_dtype; the tile divides all three and has no splits."""
    tiles = Tiles(tile, *(m_values.shape[0], n_values.shape[0], m_values.shape[1]))
    return launch(
        functools.partial(_body, tiles=tiles, parts=None),
        tiles,
        (m_values, n_values, m_scales, n_scales),
        out=jax.ShapeDtypeStruct((tiles.m, tiles.n), out_dtype),
        scratch=_scratch(tile, m_values.dtype) | {"staged": _staged(tile, out_dtype)},
        name="matmul_w8a8_hopper",
        interpret=interpret,
    )


def product_in_parts(
    m_values: Shaped[Array, "M K"],
    n_values: Shaped[Array, "N K"],
    m_scales: Float[Array, " M"],
    n_scales: Float[Array, " N"],
    *,
    tile: Tile,
    out_dtype: DTypeLike,
    interpret: Any = None,
) -> jax.Array:
    """[splits, N, M]: parts to add, of out_dtype, or float32 and without scales if several; the tile divides all."""
    tiles = Tiles(tile, *(m_values.shape[0], n_values.shape[0], m_values.shape[1]))
    parts = Parts(tiles, out_dtype)
    stored = launch(
        functools.partial(_body, tiles=tiles, parts=parts),
        tiles,
        (m_values, n_values, m_scales, n_scales),
        out=parts.out,
        scratch=_scratch(tile, m_values.dtype) | {"staged": parts.staged},
        name="matmul_w8a8_hopper",
        interpret=interpret,
    )
    return parts.by_rows(stored)


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


def _body(
    m_gmem: Any,  # [M, K]
    n_gmem: Any,  # [N, K]
    m_scales: Any,  # [M]
    n_scales: Any,  # [N]
    out_gmem: Any,  # [M, N], or parts
    *,
    tiles: Tiles,
    parts: Parts | None,
    **scratch: Any,
) -> None:
    """One block: the last warpgroup copies, the others multiply."""
    tile = tiles.tile
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
                plgpu.copy_gmem_to_smem(m_gmem.at[pl.ds(m, tile.block_m), inputs], m_smem.at[slot], full)
                plgpu.copy_gmem_to_smem(
                    n_gmem.at[pl.ds(n, tile.n), inputs], n_smem.at[slot], full, collective_axes=shared_by(tile)
                )

            if scales_ring is not None:
                full = scales_ring.to_fill(turn)[1]
                plgpu.copy_gmem_to_smem(m_scales.at[pl.ds(m, tile.block_m)], m_scales_smem, full)
                plgpu.copy_gmem_to_smem(n_scales.at[pl.ds(n, tile.n)], n_scales_smem, full)

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
                by_row = along_columns(m_scales_smem[rows], sums.shape)
            if parts is None:
                _store(sums * by_row, n_scales_smem, staged, out_gmem.at[pl.ds(m, tile.m), pl.ds(n, tile.n)])
            elif scales_ring is not None:
                parts.store(sums * by_row * along_rows(n_scales_smem[...], sums.shape), staged, out_gmem, split, m, n)
            else:
                parts.store(sums, staged, out_gmem, split, m, n)
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


def _store(sums: jax.Array, n_scales: Any, staged: Any, to: Any) -> None:
    """Scale and store a tile [m, n] as wide as `staged` at a time, one part on its way while the next is made."""
    (rows, columns), width = sums.shape, staged.shape[-1]
    for part, first in enumerate(range(0, columns, width)):
        scaled = sums[:, first : first + width] * along_rows(n_scales[pl.ds(first, width)], (rows, width))
        plgpu.wait_smem_to_gmem(min(part, 1), wait_read_only=True)  # all, before the first: parts may be odd
        staged[part % 2] = scaled.astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged.at[part % 2], to.at[:, pl.ds(first, width)])
