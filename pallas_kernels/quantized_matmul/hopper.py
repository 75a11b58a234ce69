"""Quantized weights on Hopper: which kernel and which tile serves a problem, and what XLA does around it.

Not differentiable: quantized weights are for inference.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ..dispatch import Platform
from ..tuning import tuned
from . import hopper_a16, hopper_w8a8
from .contract import MatmulProblem, QuantizedWeight, WeightFormat
from .formats import quantize_rows
from .hopper_tiles import Tile
from .hopper_unpack import decoder
from .hopper_w8a8 import Operand

Kind = Literal["w8a8", "w8a16", "w4a16"]

NARROW = (8, 16, 32, 64, 128)  # rows of activations that are N; more are N's tiles of 128 beside bfloat16, else M
_LINE = 128  # bytes of a row of 8-bit operands in the least stage
_TOGETHER = 128  # channels: weights of a multiple share a launch, as one of fewer would narrow the others' tiles


def unsupported(problem: MatmulProblem) -> str | None:
    """Why this file cannot serve a problem, or serves it worse than the next.

    Inputs must be whole stages, 128 bytes of a channel: 256 of 4 bits, 128 of 8.
    """
    format = problem.format
    if format is None:
        return "weights that are not quantized are XLA's"
    if problem.dtype != "bfloat16":
        return f"activations must be bfloat16, not {problem.dtype}"
    if reason := unsupported_format(format):
        return reason
    inputs = _LINE if kind_of(format) == "w8a8" else decoder(format.storage).inputs
    if problem.out_dim % 64 or problem.in_dim % inputs:
        return f"out must be a multiple of 64 and in of {inputs}, not {problem.out_dim} and {problem.in_dim}"
    if reason := hopper_a16.unsupported(format, problem.in_dim):
        return reason
    limit = tuned("quantized_matmul", problem.device_kind, "a16_limit")["rows"]
    if kind_of(format) != "w8a8" and problem.num_rows > limit:
        return f"more than {limit} rows, not {problem.num_rows}, are faster with the weight dequantized, in cuBLAS"
    return None


def unsupported_format(format: WeightFormat) -> str | None:
    """Why no kernel here multiplies weights of a format."""
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


def tile_for(
    format: WeightFormat, num_rows: int, out_dim: int, in_dim: int, device_kind: str, *, unit: int | None = None
) -> Tile:
    """The tuned tile for so many rows, fitted to the weight; to several, which have `out_dim` channels together, each
    of them a multiple of `unit`."""
    kind, unit = kind_of(format), unit or out_dim
    narrow = next((rows for rows in NARROW if num_rows <= rows), None)
    if kind == "w8a8" and narrow is None:
        wide, square = (Tile(**tuned("quantized_matmul", device_kind, key)) for key in ("w8a8_wide", "w8a8_square"))
        fills = -(-num_rows // wide.block_m) * (out_dim // wide.n) >= wide.blocks
        tile = wide if fills else square
        tile = dataclasses.replace(tile, n=math.gcd(tile.n, unit))
        return tile.fitted(_padded(num_rows, tile.block_m), out_dim, k_parts=1)
    tile = Tile(**tuned("quantized_matmul", device_kind, f"{kind}_{narrow or NARROW[-1]}"))
    if unit % tile.block_m:
        tile = dataclasses.replace(tile, warpgroups=1)
    if kind == "w8a8" and in_dim % tile.k:
        tile = dataclasses.replace(tile, k=_LINE, stages=tile.stages * tile.k // _LINE)
    rows = _padded(num_rows, tile.n)
    if kind == "w8a8":
        return tile.fitted(out_dim, rows, in_dim // tile.k)
    # Splits of a16 are alike but the last, and of a least number of stages.
    num_stages, least = in_dim // tile.k, hopper_a16.stages_of_split(format)
    stages = _padded(-(-num_stages // tile.filling_splits(out_dim, rows)), least)
    return dataclasses.replace(tile.fitted(out_dim, rows, k_parts=1), splits=-(-num_stages // stages))


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
    return matmuls(
        x, [weight], platform=platform, out_dtype=out_dtype, device_kind=device_kind, tile=tile, interpret=interpret
    )[0]


def matmuls(
    x: jax.Array,
    weights: Sequence[QuantizedWeight],
    *,
    platform: Platform,
    out_dtype: DTypeLike,
    device_kind: str,
    tile: Tile | None = None,
    most: int | None = None,
    interpret: Any = None,
) -> list[jax.Array]:
    """As `matmul`, with weights of one format: 8-bit ones of 8-bit activations, whose rows are quantized once, share a
    launch where that was tuned (or `most` weights may) and their channels divide into the same tiles."""
    del platform
    format, rows = weights[0].format, x.reshape(-1, x.shape[-1])

    def fitted(together: Sequence[QuantizedWeight]) -> Tile:
        return tile or _tile_of(together, rows.shape[0], device_kind)

    if format.activations == "own":
        products = [_a16(rows, weight, fitted([weight]), out_dtype, interpret) for weight in weights]
    else:
        values, scales = quantize_rows(rows, format.activations)
        products = []
        for together in _launches(weights, most or tuned("quantized_matmul", device_kind, "w8a8_launch")["weights"]):
            products += _w8a8(values, scales, together, fitted(together), out_dtype, interpret)
    return [product.reshape(*x.shape[:-1], product.shape[-1]) for product in products]


def matmul_of_rows(
    values: Shaped[Array, "M in"], row_scales: Float[Array, "M 1"], weight: QuantizedWeight, *,
    out_dtype: DTypeLike, device_kind: str,
) -> jax.Array:  # fmt: skip
    """[M, out] of activations that are quantized already, as the weight's format says (`formats.quantize_rows`)."""
    tile = _tile_of([weight], values.shape[0], device_kind)
    return _w8a8(values, row_scales, [weight], tile, out_dtype, None)[0]


def _tile_of(weights: Sequence[QuantizedWeight], num_rows: int, device_kind: str) -> Tile:
    """For weights that share a launch."""
    out_dims = [weight.shape[0] for weight in weights]
    format, in_dim = weights[0].format, weights[0].shape[1]
    return tile_for(format, num_rows, sum(out_dims), in_dim, device_kind, unit=math.gcd(*out_dims))


def _launches(weights: Sequence[QuantizedWeight], most: int) -> list[Sequence[QuantizedWeight]]:
    """All together, or each alone where they are more than `most` or one of them would narrow the others' tiles."""
    if len(weights) > most or any(weight.shape[0] % _TOGETHER for weight in weights):
        return [[weight] for weight in weights]
    return [weights]


def _w8a8(
    values: jax.Array, row_scales: jax.Array, weights: Sequence[QuantizedWeight], tile: Tile, out_dtype: DTypeLike,
    interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    """One launch. Few rows are N; the outputs are then transposed and may come in parts."""
    num_rows, is_narrow = values.shape[0], values.shape[0] <= NARROW[-1]
    size = tile.n if is_narrow else tile.block_m * tile.cluster
    rows = Operand(_pad(values, size), _pad(row_scales, size)[:, 0])
    channels = [Operand(weight.values, weight.scales[:, 0].astype(jnp.float32)) for weight in weights]
    options: dict[str, Any] = {"tile": tile, "out_dtype": out_dtype, "interpret": interpret}
    if not is_narrow:
        return [product[:num_rows] for product in hopper_w8a8.products(rows, channels, **options)]
    of_each = hopper_w8a8.products_in_parts(channels, rows, **options)
    if tile.splits == 1:
        return [parts[0, :num_rows] for parts in of_each]
    return [
        (_sum(parts)[:num_rows] * row_scales * by_channel).astype(out_dtype)
        for parts, (_, by_channel) in zip(of_each, channels, strict=True)
    ]


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
