"""What the kernels share around their call: tuned sizes, quantized rows, and gradients, of which they have none."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from ..dispatch import Platform
from ..mosaic import TILED_ROWS
from ..quantized_matmul.contract import QuantizedWeight
from ..quantized_matmul.formats import quantize_rows
from ..quantized_matmul.row_tiles import Sizes, mean_tile_rows
from . import xla


def tuned_sizes(
    x: Float[Array, "M in"], weight: Float[Array, "E out in"] | QuantizedWeight, row_tiles: Sequence[int], kind: str
) -> Sizes:
    """The tuned sizes of a kind of device, with the one of `row_tiles` that groups of the mean rows ask for."""
    stored = weight.values if isinstance(weight, QuantizedWeight) else weight
    rows = mean_tile_rows(x.shape[0], stored.shape[0], row_tiles, most_before=TILED_ROWS - 1)
    return Sizes.of("grouped_matmul", kind, stored.dtype, rows)


def call(
    kernel: Callable[..., jax.Array],
    x: Float[Array, "M in"],
    weight: Float[Array, "E out in"] | QuantizedWeight,
    group_sizes: Int32[Array, " E"],
    *,
    platform: Platform,
    out_dtype: DTypeLike,
) -> Float[Array, "M out"]:
    """kernel(x, weight, group_sizes, scales, out_dtype=...): of a plain weight with the gradients of xla, of an fp8 one
    with rows quantized and the scales of both, [M] and [E, out].
    """
    multiply = functools.partial(kernel, out_dtype=jnp.dtype(out_dtype))
    if isinstance(weight, QuantizedWeight):
        values, row_scales = quantize_rows(x, "float8_e4m3fn")
        return multiply(values, weight.values, group_sizes, (row_scales[:, 0], weight.scales[..., 0]))
    return _with_xla_gradients(
        lambda x, weight: multiply(x, weight, group_sizes, None),
        x, weight, group_sizes, platform=platform, out_dtype=out_dtype,
    )  # fmt: skip


def _with_xla_gradients(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    x: Float[Array, "M in"],
    weight: Float[Array, "E out in"],
    group_sizes: Int32[Array, " E"],
    *,
    platform: Platform,
    out_dtype: DTypeLike,
) -> Float[Array, "M out"]:
    """multiply(x, weight), whose gradients are those of the xla implementation."""

    @jax.custom_vjp
    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return multiply(x, weight)

    def forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return run(x, weight), (x, weight)

    def backward(saved: tuple[jax.Array, jax.Array], push: jax.Array) -> tuple[jax.Array, jax.Array]:
        plain = functools.partial(xla.grouped_matmul, platform=platform, out_dtype=out_dtype)
        _, pull = jax.vjp(lambda x, weight: plain(x, weight, group_sizes), *saved)
        gradients: tuple[jax.Array, jax.Array] = pull(push)
        return gradients

    run.defvjp(forward, backward)
    output: jax.Array = run(x, weight)
    return output
