"""Grouped matmul for Blackwell: the kernel of the linear layers with a work list of many groups."""

import functools
from typing import TYPE_CHECKING, Any

import jax
from jax.typing import DTypeLike

from ..dispatch import Platform
from ..quantized_matmul import blackwell
from ..quantized_matmul.contract import QuantizedWeight
from ..quantized_matmul.row_tiles import Sizes, is_fp8
from .kernel_call import call, tuned_sizes

if TYPE_CHECKING:
    from . import GroupedMatmulProblem


def unsupported(problem: "GroupedMatmulProblem") -> str | None:
    """Why this file cannot serve a problem."""
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
    sizes = sizes or tuned_sizes(x, weight, blackwell.ROW_TILES, device_kind)
    kernel = functools.partial(blackwell.multiply_groups, sizes=sizes, interpret=interpret)
    return call(kernel, x, weight, group_sizes, platform=platform, out_dtype=out_dtype)
