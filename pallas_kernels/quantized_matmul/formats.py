"""Weights and activations into their formats and back.

Rounding is to the nearest, scales come from the largest magnitude; 4-bit formats take the best of a few scales around
it. One code serves jax and numpy (`xp`): what converts on a host gets the numbers that a device would. So constants
multiply, for XLA makes multiplications of divisions by them.
"""

from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from ...errors import KernelError
from .contract import MAX_VALUE, UINT4_OFFSET, QuantizedWeight, WeightFormat

# Scales that are tried, as multiples of max|w| / largest value. Those below 1 clip the largest for finer steps; those
# above 1 leave out the top of 4-bit floats, where they are coarsest.
_RATIOS = {"uint4": (1.0, 0.95, 0.9, 0.85, 0.8), "float4_e2m1": (1.0, 0.9, 1.2, 1.35, 1.5)}
_POWER_RATIOS = (1.0, 0.5)  # where scales are powers of two
# The smallest and the largest scale of each dtype; XLA flushes subnormals of float32.
_SCALE_LIMITS = {
    "float32": (2.0**-126, 3.4028234e38),
    "bfloat16": (2.0**-126, 3.3895314e38),
    "float16": (2.0**-24, 65504.0),
    "float8_e4m3fn": (2.0**-9, 448.0),
    "float8_e8m0fnu": (2.0**-126, 2.0**127),
}
_AXES = (-3, -1)  # of what shares a scale, in [..., blocks, rows, groups, inputs]


def quantize(weight: Float[Array, "*lead out in"], format: WeightFormat) -> QuantizedWeight:
    """The weight in a format.

    Raises:
      KernelError: its shape does not fit the format.
    """
    whole = global_scale(weight, format) if format.global_scale else None
    values, scales, zeros = quantize_part(weight, format, whole)
    return QuantizedWeight(values=values, scales=scales, zeros=zeros, global_scale=whole, format=format)


def dequantize(weight: QuantizedWeight) -> Float[Array, "*lead out in"]:
    """The weight in float32."""
    whole: jax.Array = dequantize_part(
        weight.values, weight.scales, weight.zeros, weight.global_scale, weight.offsets, format=weight.format
    )
    return whole


def global_scale(weight: Any, format: WeightFormat) -> Any:
    """The scale [*lead] of a weight [*lead, out, in], such that its largest group has the largest scale there is."""
    xp = _module(weight)
    largest = MAX_VALUE[format.storage] * _SCALE_LIMITS[format.scale][1]
    top = xp.max(xp.abs(xp.asarray(weight)), axis=(-2, -1)).astype(np.float32)
    return xp.maximum(top * np.float32(1 / largest), np.finfo(np.float32).tiny)


def quantize_part(weight: Any, format: WeightFormat, global_scale: Any = None) -> tuple[Any, Any, Any]:
    """Values, scales and zeros (None without) of a weight, or of whole blocks of its rows; jax or numpy, as it is.

    Raises:
      KernelError: its shape does not fit the format, or that has offsets, to which nothing is rounded here.
    """
    xp = _module(weight)
    if format.offsets:
        raise KernelError(f"{format.name} has offsets: such weights are read as they are; quantize to one without")
    *lead, out_dim, in_dim = weight.shape
    if reason := format.misfit(out_dim, in_dim):
        raise KernelError(f"a weight [out, in] = {(out_dim, in_dim)} cannot be quantized as {format.name}: {reason}")
    num_blocks, num_groups = format.scales_shape(out_dim, in_dim)
    shape = (*lead, num_blocks, format.block_rows, num_groups, in_dim // num_groups)
    blocks = xp.asarray(weight, np.float32).reshape(shape)
    if global_scale is not None:
        blocks = blocks / xp.reshape(global_scale, (*lead, 1, 1, 1, 1))
    if format.zeros:
        codes, scales, zeros = _quantize_between(blocks, format)
    else:
        scales, zeros = _best_scales(blocks, format), None
        codes = encode(blocks / scales.astype(np.float32), format)
    values = codes.reshape(*lead, out_dim, in_dim)
    shape = (*lead, num_blocks, num_groups)
    return (
        pack_nibbles(values) if format.is_packed else values,
        scales.reshape(shape),
        None if zeros is None else zeros.reshape(shape),
    )


def dequantize_part(
    values: Any, scales: Any, zeros: Any, global_scale: Any, offsets: Any = None, *, format: WeightFormat
) -> Any:
    """A weight, or whole blocks of its rows, in float32; jax or numpy, as it is."""
    xp = _module(values)
    codes = unpack_nibbles(values) if format.is_packed else values
    *lead, out_dim, in_dim = codes.shape
    num_blocks, num_groups = scales.shape[-2:]
    codes = codes.reshape(*lead, num_blocks, format.block_rows, num_groups, in_dim // num_groups)
    wide = decode(codes, format)
    if zeros is not None:
        wide = wide - (zeros[..., :, None, :, None].astype(np.float32) - UINT4_OFFSET)
    wide = wide * scales[..., :, None, :, None].astype(np.float32)
    if global_scale is not None:
        wide = wide * xp.reshape(global_scale, (*lead, 1, 1, 1, 1))
    if offsets is not None:
        wide = wide + offsets[..., :, None, :, None].astype(np.float32)
    return wide.reshape(*lead, out_dim, in_dim)


def quantize_rows(
    x: Float[Array, "*rows in"], dtype: Literal["int8", "float8_e4m3fn"], group: int | None = None
) -> tuple[Shaped[Array, "*rows in"], Float[Array, "*rows groups"]]:
    """Activations as values and a float32 scale for each row, or for each row and group of inputs.

    A row of zeros has scale 0 and values 0; one with NaN has a NaN scale.
    """
    width = group or x.shape[-1]
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // width, width)
    scales = jnp.max(jnp.abs(blocks), axis=-1) * np.float32(1 / MAX_VALUE[dtype])
    scaled = blocks / jnp.where(scales == 0, 1.0, scales)[..., None]
    values = (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype)
    return values.reshape(x.shape), scales


def pack_nibbles(values: Any) -> Any:
    """Values 0..15 [..., in], two in a byte [..., in // 2]: even ones low; jax or numpy, as they are."""
    values = values.astype(np.uint8)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def unpack_nibbles(packed: UInt8[Array, "*rows half"]) -> UInt8[Array, "*rows in"]:
    """What `pack_nibbles` packed."""
    xp = _module(packed)
    both: Array = xp.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _module(array: Any) -> ModuleType:
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def _best_scales(blocks: Any, format: WeightFormat) -> Any:
    """The scales of least squared error among those tried, in their dtype."""
    xp = _module(blocks)
    top = xp.max(xp.abs(blocks), axis=_AXES, keepdims=True) * np.float32(1 / MAX_VALUE[format.storage])
    best = _to_scales(top, format)
    ratios = _RATIOS.get(format.storage, (1.0,))
    if len(ratios) == 1:
        return best
    least = _squared_error(blocks, best, format)
    for ratio in (_POWER_RATIOS if format.scale == "float8_e8m0fnu" else ratios)[1:]:
        scales = _to_scales(top * np.float32(ratio), format)
        error = _squared_error(blocks, scales, format)
        best, least = xp.where(error < least, scales, best), xp.minimum(error, least)
    return best


def _squared_error(blocks: Any, scales: Any, format: WeightFormat) -> Any:
    xp = _module(blocks)
    wide = scales.astype(np.float32)
    return xp.sum((decode(encode(blocks / wide, format), format) * wide - blocks) ** 2, axis=_AXES, keepdims=True)


def _quantize_between(blocks: Any, format: WeightFormat) -> tuple[Any, Any, Any]:
    """Codes, scales and zero points of uint4 between the smallest and the largest value, zero among them."""
    xp = _module(blocks)
    low = xp.minimum(xp.min(blocks, axis=_AXES, keepdims=True), 0)
    high = xp.maximum(xp.max(blocks, axis=_AXES, keepdims=True), 0)
    scales = _to_scales((high - low) * np.float32(1 / 15), format)
    zeros = xp.clip(xp.round(-low / scales.astype(np.float32)), 0, 15)
    codes = xp.clip(xp.round(blocks / scales.astype(np.float32)) + zeros, 0, 15)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def _to_scales(wanted: Any, format: WeightFormat) -> Any:
    """Scales in the dtype that stores them, none of them zero; powers of two are rounded up."""
    xp, (smallest, largest) = _module(wanted), _SCALE_LIMITS[format.scale]
    wanted = xp.clip(wanted, np.float32(smallest), np.float32(largest))
    if format.scale == "float8_e8m0fnu":
        fraction, exponent = xp.frexp(wanted)
        wanted = xp.ldexp(np.float32(1), exponent - (fraction == 0.5))
    return wanted.astype(format.scales_dtype)


def encode(scaled: Any, format: WeightFormat) -> Any:
    """Values divided by their scale as what is stored, 4-bit ones still one a byte."""
    xp, largest = _module(scaled), np.float32(MAX_VALUE[format.storage])
    if format.storage == "float4_e2m1":
        return _encode_e2m1(scaled)
    if format.storage == "float8_e4m3fn":
        return xp.clip(scaled, -largest, largest).astype(format.values_dtype)
    if format.storage == "int8":
        return xp.clip(xp.round(scaled), -largest, largest).astype(np.int8)
    return (xp.clip(xp.round(scaled), -UINT4_OFFSET, largest) + UINT4_OFFSET).astype(np.uint8)


def decode(codes: Any, format: WeightFormat) -> Any:
    """What `encode` gave, in float32 and before its scale."""
    if format.storage == "float4_e2m1":
        return _decode_e2m1(codes)
    wide = codes.astype(np.float32)
    return wide - UINT4_OFFSET if format.storage == "uint4" else wide


def _encode_e2m1(scaled: Any) -> Any:
    """Float32 as 4-bit floats 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign; ties to the even code, larger ones to 6."""
    xp = _module(scaled)
    size = xp.abs(scaled)
    code = (size > 0.25).astype(np.uint8)
    for limit, is_tie_up in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code = code + (size >= limit if is_tie_up else size > limit).astype(np.uint8)
    return code | xp.where(scaled < 0, np.uint8(8), np.uint8(0))


def _decode_e2m1(codes: Any) -> Any:
    """4-bit floats in float32, by arithmetic: a table would be a gather, which XLA does one by one."""
    xp = _module(codes)
    code, sign = codes & 7, 1 - (codes >> 3).astype(np.int8) * 2
    doubled = xp.where(code < 2, code, (2 + (code & 1)) << (xp.maximum(code >> 1, 1) - 1))
    return (doubled.astype(np.int8) * sign).astype(np.float32) * np.float32(0.5)
