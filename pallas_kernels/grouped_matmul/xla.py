"""Grouped matmul in plain XLA: a loop over tiles of rows that share a group, so only groups with rows are read.

Each turn is one dot of a tile's rows with weight[e]; the loop ends with the last tile in use. A tile that reaches past
its group writes zeros there, which the next group's tiles overwrite: tiles run in ascending order. On the CPU XLA's
own `ragged_dot` computes every row times every group (5 to 500 times slower). Reading weights bounds it where groups
have few rows, arithmetic where they have many.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from ..quantized_matmul import QuantizedWeight
from ..quantized_matmul.xla import matmul

MIN_TILE_ROWS = {"cpu": 8, "gpu": 16}  # tensor cores want 16
MAX_TILE_ROWS = {"cpu": 64, "gpu": 128}


def grouped_matmul(
    x: jax.Array, weight: jax.Array | QuantizedWeight, group_sizes: jax.Array, *, platform: Platform,
    out_dtype: DTypeLike,
) -> jax.Array:  # fmt: skip
    """See the contract."""
    tile_rows = _tile_rows(x.shape[0], weight.shape[0], platform)
    if isinstance(weight, QuantizedWeight):

        def product(rows: jax.Array, group: jax.Array) -> jax.Array:
            one = jax.tree.map(lambda array: array[group], weight)
            return matmul(rows, one, platform=platform, out_dtype=jnp.float32)

        return _map_tiles(tile_rows, x, group_sizes, product, jnp.zeros((x.shape[0], weight.shape[1]), out_dtype))
    return _grouped_matmul(tile_rows, jnp.dtype(out_dtype), x, weight, group_sizes)


def _tile_rows(num_rows: int, num_groups: int, platform: Platform) -> int:
    """About the mean rows of a group; on a CPU dots of 2 or 4 rows lose to both 1 and 8."""
    if platform == "cpu" and num_rows <= num_groups:
        return 1
    tile_rows = MIN_TILE_ROWS[platform]
    while tile_rows * num_groups < num_rows and tile_rows < MAX_TILE_ROWS[platform]:
        tile_rows *= 2
    return tile_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))  # a loop with a traced end has no reverse mode of its own
def _grouped_matmul(
    tile_rows: int, out_dtype: jnp.dtype, x: jax.Array, weight: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    output = jnp.zeros((x.shape[0], weight.shape[1]), out_dtype)
    return _map_tiles(tile_rows, x, group_sizes, lambda rows, group: _dot(rows, weight[group], (1, 1)), output)


def _forward(
    tile_rows: int, out_dtype: jnp.dtype, x: jax.Array, weight: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_matmul(tile_rows, out_dtype, x, weight, group_sizes), (x, weight, group_sizes)


def _backward(
    tile_rows: int, out_dtype: jnp.dtype, saved: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, weight, group_sizes = saved
    x_grad = _map_tiles(
        tile_rows, cotangent, group_sizes, lambda rows, group: _dot(rows, weight[group], (1, 0)), jnp.zeros_like(x)
    )
    tiles, padded_x = _Tiles.of(group_sizes, tile_rows), _pad_rows(x, tile_rows)
    padded_cotangent = _pad_rows(cotangent, tile_rows)

    def add_tile(tile: jax.Array, total: jax.Array) -> jax.Array:
        group, start, used = tiles.place(tile)
        rows = jnp.where(used, jax.lax.dynamic_slice_in_dim(padded_x, start, tile_rows), 0)
        product = _dot(jax.lax.dynamic_slice_in_dim(padded_cotangent, start, tile_rows), rows, (0, 0))
        return total.at[group].add(product)

    weight_grad = jax.lax.fori_loop(0, tiles.num_tiles, add_tile, jnp.zeros(weight.shape, jnp.float32))
    return x_grad, weight_grad.astype(weight.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


class _Tiles(NamedTuple):
    """The tiles of a grouping, numbered in the order of their rows; `tile_rows` is the rows of one."""

    tile_rows: int
    row_ends: jax.Array  # [E], after each group's last row
    tile_ends: jax.Array  # [E], after each group's last tile

    @classmethod
    def of(cls, group_sizes: jax.Array, tile_rows: int) -> "_Tiles":
        """Every group starts a new tile; an empty one has none."""
        return cls(tile_rows, jnp.cumsum(group_sizes), jnp.cumsum((group_sizes + tile_rows - 1) // tile_rows))

    @property
    def num_tiles(self) -> jax.Array:
        """Tiles with rows."""
        return self.tile_ends[-1]

    def place(self, tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A tile's group, its first row, and which of its rows [tile_rows, 1] are its group's."""
        group = jnp.searchsorted(self.tile_ends, tile, side="right")
        before = jnp.where(group > 0, group - 1, 0)
        first_row = jnp.where(group > 0, self.row_ends[before], 0)
        first_tile = jnp.where(group > 0, self.tile_ends[before], 0)
        start = first_row + (tile - first_tile) * self.tile_rows
        return group, start, (start + jnp.arange(self.tile_rows) < self.row_ends[group])[:, None]


def _map_tiles(
    tile_rows: int,
    x: jax.Array,
    group_sizes: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    zeros: jax.Array,
) -> jax.Array:
    """Where `zeros` were, the `product` of each row and the number of its group, computed tile by tile."""
    tiles, padded = _Tiles.of(group_sizes, tile_rows), _pad_rows(x, tile_rows)

    def write_tile(tile: jax.Array, output: jax.Array) -> jax.Array:
        group, start, used = tiles.place(tile)
        rows = product(jax.lax.dynamic_slice_in_dim(padded, start, tile_rows), group)
        rows = jnp.where(used, rows, 0).astype(output.dtype)
        return jax.lax.dynamic_update_slice_in_dim(output, rows, start, axis=0)

    output: jax.Array = jax.lax.fori_loop(0, tiles.num_tiles, write_tile, _pad_rows(zeros, tile_rows))
    return output[: x.shape[0]]


def _pad_rows(x: jax.Array, num_rows: int) -> jax.Array:
    """Room for a last tile that reaches past the last row, since a slice out of range would be moved."""
    return jnp.pad(x, ((0, num_rows), (0, 0)))


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """x and y contracted over one axis each, in float32; HIGHEST keeps a GPU from rounding to TF32."""
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
