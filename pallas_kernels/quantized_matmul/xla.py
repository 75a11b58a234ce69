"""One XLA dot over the last axes, accumulated in float32, or int32 where both sides are int8; scales come after.

Where a scale belongs to a whole row of the weight, the stored values enter the dot: as they are beside quantized
activations (int8 everywhere, fp8 on GPUs, where XLA hands both to cuBLASLt), else converted, which is exact. Weights
in groups are dequantized first.

On the CPU a dot of one row in bfloat16 or int8 first converts the whole weight (22 ms for 2048 x 8192, where two rows
take 2.7), so one row goes as two; float32 has no such trap. Whatever is converted or dequantized there costs as much
as the weight is large: right, not yet fast.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from .contract import QuantizedWeight, Weight
from .formats import dequantize, quantize_rows
from .reference import rounded


def matmul(x: jax.Array, weight: Weight, *, platform: Platform, out_dtype: DTypeLike) -> jax.Array:
    """See the contract."""
    if x.ndim == 1:
        return matmul(x[None], weight, platform=platform, out_dtype=out_dtype)[0]
    if platform == "cpu" and x.shape[-2] == 1 and (x.dtype != jnp.float32 or isinstance(weight, QuantizedWeight)):
        twice = jnp.broadcast_to(x, (*x.shape[:-2], 2, x.shape[-1]))
        return matmul(twice, weight, platform=platform, out_dtype=out_dtype)[..., :1, :]
    product = product_of(x, weight, platform) if isinstance(weight, QuantizedWeight) else dot(x, weight)
    return product.astype(out_dtype)


def product_of(x: jax.Array, weight: QuantizedWeight, platform: Platform) -> jax.Array:
    """[..., in] times one quantized weight, in float32."""
    format = weight.format
    is_by_row = format.group is None and format.block_rows == 1 and not format.is_packed and not format.offsets
    if not is_by_row:
        # float8 activations with a scale are no bfloat16s: rounding them again would cost what the format has left.
        wide = x if format.activations == "own" else rounded(x, weight).astype(x.dtype)
        return dot(wide, dequantize(weight).astype(x.dtype))
    channel_scales = weight.scales[..., 0].astype(jnp.float32)
    if weight.global_scale is not None:
        channel_scales = channel_scales * weight.global_scale
    if format.activations == "own":
        return dot(x, weight.values.astype(x.dtype)) * channel_scales
    values, row_scales = quantize_rows(x, format.activations)
    if format.activations == format.storage and (format.storage == "int8" or platform == "gpu"):
        product = dot(values, weight.values)
    else:
        product = dot(values.astype(jnp.bfloat16), weight.values.astype(jnp.bfloat16))
    return product * row_scales * channel_scales


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """[..., in] and [out, in] to float32 [..., out]."""
    is_int = x.dtype == jnp.int8
    # HIGHEST keeps a GPU from rounding float32 to TF32; it changes nothing on a CPU, nor for narrower types.
    product = jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if is_int else jnp.float32,
    )
    return product.astype(jnp.float32)
