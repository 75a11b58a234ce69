"""Quantized weights on Hopper: which kernel and which tile serves a problem, and what XLA does around it.

Not differentiable: quantized weights are for inference.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from ..hopper_operands import decoder
from ..tuning import generation, tuned
from . import hopper_a16, hopper_w8a8
from .contract import MatmulProblem, QuantizedWeight, WeightFormat
from .formats import quantize_rows
from .hopper_tiles import Tile

Kind = Literal["w8a8", "w8a16", "w4a16"]

NARROW = (8, 16, 32, 64, 128)  # rows of activations that are N; more are N's tiles of 128 beside bfloat16, else M
_LINE = 128  # bytes of a row of 8-bit operands in the least stage


def unsupported(problem: MatmulProblem) -> str | None:
    """Why this file cannot serve a problem, or serves it worse than the next."""
    format = problem.format
    if problem.platform != "gpu" or generation(problem.device_kind) != "hopper":
        return f"it is made for Hopper, not for {problem.device_kind or problem.platform}"
    if format is None:
        return "weights that are not quantized are XLA's"
    if problem.dtype != "bfloat16":
        return f"activations must be bfloat16, not {problem.dtype}"
    if reason := _unsupported_format(format):
        return reason
    inputs = _LINE if kind_of(format) == "w8a8" else hopper_a16.inputs_of_panel(format)
    if problem.out_dim % 64 or problem.in_dim % inputs:
        return f"out must be a multiple of 64 and in of {inputs}, not {problem.out_dim} and {problem.in_dim}"
    limit = tuned("quantized_matmul", problem.device_kind, "a16_limit")["rows"]
    if kind_of(format) != "w8a8" and problem.num_rows > limit:
        return f"more than {limit} rows, not {problem.num_rows}, are faster with the weight dequantized, in cuBLAS"
    return None


def _unsupported_format(format: WeightFormat) -> str | None:
    if format.block_rows != 1:
        return f"{format.name} has scales for blocks of channels"
    if format.offsets:
        return f"{format.name} has offsets beside its scales"
    if format.activations != "own":
        if format.activations == format.storage and format.group is None and not format.global_scale:
            return None
        return f"{format.name} quantizes activations, but not to the weight's {format.storage} with one scale a row"
    stage = decoder(format.storage).inputs
    if format.group is not None and (stage % format.group or stage // format.group > 16):
        return f"groups of {format.group} inputs do not divide stages of {stage} into at most 16"
    return None


def kind_of(format: WeightFormat) -> Kind:
    """Which kernel a format needs."""
    if format.activations != "own":
        return "w8a8"
    return "w4a16" if format.is_packed else "w8a16"


def tile_for(format: WeightFormat, num_rows: int, out_dim: int, in_dim: int, device_kind: str) -> Tile:
    """The tuned tile for so many rows, fitted to the weight."""
    kind = kind_of(format)
    narrow = next((rows for rows in NARROW if num_rows <= rows), None)
    if kind == "w8a8" and narrow is None:
        sizes = tuned("quantized_matmul", device_kind, "w8a8_512" if num_rows <= 512 else "w8a8_wide")
        tile = Tile(**sizes)
        tile = dataclasses.replace(tile, n=math.gcd(tile.n, out_dim))
        return tile.fitted(_padded(num_rows, tile.block_m), out_dim, k_parts=1)
    tile = Tile(**tuned("quantized_matmul", device_kind, f"{kind}_{narrow or NARROW[-1]}"))
    if out_dim % tile.block_m:
        tile = dataclasses.replace(tile, warpgroups=1)
    if kind == "w8a8" and in_dim % tile.k:
        tile = dataclasses.replace(tile, k=_LINE, stages=tile.stages * tile.k // _LINE)
    parts = tile.k if kind == "w8a8" else hopper_a16.inputs_of_panel(format)
    return tile.fitted(out_dim, _padded(num_rows, tile.n), in_dim // parts)


def matmul(
    x: jax.Array,
    weight: QuantizedWeight,
    *,
    platform: Platform,
    out_dtype: DTypeLike,
    device_kind: str,
    tile: Tile | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See the contract; `tile` and `interpret` are for tests and tuning."""
    del platform
    out_dim, in_dim = weight.shape
    rows = x.reshape(-1, in_dim)
    tile = tile or tile_for(weight.format, rows.shape[0], out_dim, in_dim, device_kind)
    compute = _w8a8 if kind_of(weight.format) == "w8a8" else _a16
    return compute(rows, weight, tile, out_dtype, interpret).reshape(*x.shape[:-1], out_dim)


def _w8a8(x: jax.Array, weight: QuantizedWeight, tile: Tile, out_dtype: DTypeLike, interpret: Any) -> jax.Array:
    """Few rows are N; the output is then transposed and may come in parts."""
    assert weight.format.activations != "own", "w8a8 quantizes activations"
    num_rows, is_narrow = x.shape[0], x.shape[0] <= NARROW[-1]
    values, row_scales = quantize_rows(x, weight.format.activations)
    size = tile.n if is_narrow else tile.block_m * tile.cluster
    values, by_row = _pad(values, size), _pad(row_scales, size)[:, 0]
    by_channel = weight.scales[:, 0].astype(jnp.float32)
    options: dict[str, Any] = {"tile": tile, "out_dtype": out_dtype, "interpret": interpret}
    if not is_narrow:
        return hopper_w8a8.product(values, weight.values, by_row, by_channel, **options)[:num_rows]
    parts = hopper_w8a8.product_in_parts(weight.values, values, by_channel, by_row, **options)
    if tile.splits == 1:
        return parts[0, :num_rows]
    return (_sum(parts)[:num_rows] * row_scales * by_channel).astype(out_dtype)


def _a16(x: jax.Array, weight: QuantizedWeight, tile: Tile, out_dtype: DTypeLike, interpret: Any) -> jax.Array:
    num_rows = x.shape[0]
    parts = hopper_a16.product(weight, _pad(x, tile.n), tile=tile, out_dtype=out_dtype, interpret=interpret)
    if tile.splits == 1:
        return parts[0, :num_rows]
    by_channel = hopper_a16.channel_scales(weight)
    whole = _sum(parts)[:num_rows]
    return (whole if by_channel is None else whole * by_channel).astype(out_dtype)


def _sum(parts: jax.Array) -> jax.Array:
    """Written out, it is elementwise, and XLA fuses it with whatever reads it."""
    whole = parts[0]
    for split in range(1, parts.shape[0]):
        whole = whole + parts[split]
    return whole


def _pad(x: jax.Array, size: int) -> jax.Array:
    """With rows of zeros up to a multiple of `size`."""
    return jnp.pad(x, ((0, -x.shape[0] % size), (0, 0)))


def _padded(rows: int, size: int) -> int:
    return -(-rows // size) * size
