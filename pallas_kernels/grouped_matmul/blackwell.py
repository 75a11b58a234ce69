"""Grouped matmul for Blackwell: the kernel of the linear layers with a work list of many groups."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from ..quantized_matmul import blackwell
from ..quantized_matmul.contract import QuantizedWeight
from ..quantized_matmul.formats import quantize_rows
from ..quantized_matmul.row_tiles import TILED_ROWS, Sizes, is_fp8, mean_tile_rows
from ..tuning import generation
from .gradients import with_xla_gradients

if TYPE_CHECKING:
    from . import GroupedMatmulProblem


def unsupported(problem: "GroupedMatmulProblem") -> str | None:
    """Why this file cannot serve a problem."""
    if problem.platform != "gpu" or generation(problem.device_kind) != "blackwell":
        return f"it is made for Blackwell, not for {problem.device_kind or problem.platform}"
    if problem.format is not None and not is_fp8(problem.format):
        return f"weights must be bfloat16 or fp8 with a scale for each channel, not {problem.format.name}"
    item_bytes = 2 if problem.format is None else 1
    return blackwell.misfit(problem.in_dim, problem.out_dim, problem.dtype, item_bytes)


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
    out_dtype = jnp.dtype(out_dtype)
    stored = weight.values if isinstance(weight, QuantizedWeight) else weight
    if sizes is None:
        choices, most_before = blackwell.ROW_TILES, TILED_ROWS - 1
        tile_rows = mean_tile_rows(x.shape[0], stored.shape[0], choices, most_before=most_before)
        sizes = Sizes.of("grouped_matmul", device_kind, stored.dtype, tile_rows)
    multiply = functools.partial(blackwell.multiply_groups, sizes=sizes, out_dtype=out_dtype, interpret=interpret)
    if isinstance(weight, QuantizedWeight):
        values, row_scales = quantize_rows(x, "float8_e4m3fn")
        return multiply(values, stored, group_sizes, (row_scales[:, 0], weight.scales[..., 0]))
    return with_xla_gradients(
        lambda x, weight: multiply(x, weight, group_sizes, None),
        x, weight, group_sizes, platform=platform, out_dtype=out_dtype,
    )  # fmt: skip
