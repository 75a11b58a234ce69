"""Grouped matmul of 4- and 8-bit weights and bfloat16 activations for Hopper: the linear layers' kernel, tile by tile.

Schedule: that of quantized_matmul/hopper_a16, where each tile of rows names the rows of the weights [E * out, in] that
are its group's. XLA gathers rows into whole tiles before, and out of them after, both in fusions with what is around
them: of few rows that is little beside the weights, which bound it. Tiles of one group are computed side by side, so
that a second tile finds the weights in L2. Empty groups have no tiles. Where the kernel's stages do not divide the
inputs, TMA fills up values with zeros, and XLA activations and scales.

Operands: as there.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from ..mosaic import LINE_BYTES
from ..quantized_matmul import hopper
from ..quantized_matmul.contract import MatmulProblem, QuantizedWeight, WeightFormat
from ..quantized_matmul.hopper_a16 import Work, inputs_of_panel, product
from ..quantized_matmul.hopper_tiles import Tile
from ..quantized_matmul.row_tiles import mean_tile_rows
from ..tuning import tuned


def unsupported(format: WeightFormat, in_dim: int, out_dim: int, device_kind: str) -> str | None:
    """Why the kernel cannot serve experts of a format: what keeps it from a linear layer of one, of whole stages."""
    if format.activations != "own":
        return f"activations must be unquantized but with fp8 by channel, and {format.name} quantizes them"
    row_bytes = format.values_shape(out_dim, in_dim)[1]
    if row_bytes % LINE_BYTES:
        return f"a channel must have a multiple of {LINE_BYTES} bytes, not {row_bytes}"
    in_dim += -in_dim % inputs_of_panel(format)
    return hopper.unsupported(
        MatmulProblem(
            platform="gpu", format=format, num_rows=1, in_dim=in_dim, out_dim=out_dim, dtype="bfloat16",
            device_kind=device_kind,
        )
    )  # fmt: skip


def tile_for(format: WeightFormat, num_rows: int, num_groups: int, out_dim: int, device_kind: str) -> Tile:
    """The linear layers' tile for about twice the mean rows of a group."""
    rows = mean_tile_rows(num_rows, num_groups, hopper.NARROW)
    tile = Tile(**tuned("quantized_matmul", device_kind, f"{hopper.kind_of(format)}_{rows}"))
    if out_dim % tile.block_m:
        tile = dataclasses.replace(tile, warpgroups=1)
    return tile.fitted(out_dim, tile.n, k_parts=1)


def grouped_matmul(
    x: jax.Array,
    weight: QuantizedWeight,
    group_sizes: jax.Array,
    *,
    tile: Tile,
    out_dtype: DTypeLike,
    interpret: Any = None,
) -> jax.Array:
    """See the contract."""
    num_rows, out_dim = x.shape[0], weight.shape[1]
    if not num_rows:
        return jnp.zeros((0, out_dim), out_dtype)
    places = _places(group_sizes, num_rows, tile.n)
    rows = places.start[:, None] + jnp.arange(tile.n)
    missing = -x.shape[1] % inputs_of_panel(weight.format)
    tiled = jnp.pad(x.at[rows.reshape(-1)].get(mode="clip"), ((0, 0), (0, missing)))
    flat = _flat(weight, missing)
    work = Work(out_dim, places.group, places.num_tiles)
    output = product(flat, tiled, tile=tile, out_dtype=out_dtype, work=work, interpret=interpret)[0]
    return output.at[places.of_row].get(mode="fill", fill_value=0)


def _flat(weight: QuantizedWeight, missing: int) -> QuantizedWeight:
    """All experts' channels as those of one weight, with scales for so many inputs more."""
    num_channels, group = weight.shape[0] * weight.shape[1], weight.format.group

    def by_group(numbers: jax.Array) -> jax.Array:
        flat = numbers.reshape(num_channels, -1)
        return jnp.pad(flat, ((0, 0), (0, missing // group)), constant_values=1) if group else flat  # some have no 0

    whole = weight.global_scale
    return QuantizedWeight(
        values=weight.values.reshape(num_channels, -1),
        scales=by_group(weight.scales),
        zeros=None if weight.zeros is None else by_group(weight.zeros),
        global_scale=None if whole is None else jnp.repeat(whole, weight.shape[1]),
        format=weight.format,
    )


class _Places(NamedTuple):
    """Tiles of rows, whose places are numbered through, and where each row went."""

    start: Int32[Array, " tiles"]
    group: Int32[Array, " tiles"]
    num_tiles: Int32[Array, " 1"]
    of_row: Int32[Array, " M"]  # past all places for rows of no group


def _places(group_sizes: jax.Array, num_rows: int, tile_rows: int) -> _Places:
    num_groups = group_sizes.shape[0]
    num_tiles = (group_sizes + tile_rows - 1) // tile_rows
    row_ends, tile_ends = jnp.cumsum(group_sizes), jnp.cumsum(num_tiles)
    first_row, first_tile = row_ends - group_sizes, tile_ends - num_tiles

    def group_of(ends: jax.Array, index: jax.Array) -> jax.Array:
        found = jnp.searchsorted(ends, index, side="right", method="compare_all")
        return jnp.minimum(found, num_groups - 1).astype(jnp.int32)

    tile = jnp.arange(min(num_rows, (num_rows + num_groups * (tile_rows - 1)) // tile_rows), dtype=jnp.int32)
    group = group_of(tile_ends, tile)
    start = first_row[group] + (tile - first_tile[group]) * tile_rows
    row = jnp.arange(num_rows, dtype=jnp.int32)
    owner = group_of(row_ends, row)
    of_row = first_tile[owner] * tile_rows + row - first_row[owner]
    of_row = jnp.where(row < row_ends[-1], of_row, tile.shape[0] * tile_rows)
    return _Places(start, group, tile_ends[-1:].astype(jnp.int32), of_row)
