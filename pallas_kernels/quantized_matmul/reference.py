"""The definition of a matmul with weights: everything in float32."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from . import formats
from .contract import QuantizedWeight, Weight


def matmul(x: jax.Array, weight: Weight, *, platform: Platform, out_dtype: DTypeLike) -> jax.Array:
    """See the contract; the weight is dequantized whole, and activations are rounded to what the format makes them."""
    del platform
    wide = rounded(x, weight) if isinstance(weight, QuantizedWeight) else x.astype(jnp.float32)
    product = jnp.einsum("...i,oi->...o", wide, dequantize(weight), precision="highest")
    return product.astype(out_dtype)


def dequantize(weight: jax.Array | QuantizedWeight) -> jax.Array:
    """A weight of either kind as a float32 array [*lead, out, in]."""
    return formats.dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.astype(jnp.float32)


def rounded(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Activations in float32, quantized and back where the format quantizes them."""
    format = weight.format
    if format.activations == "own":
        return x.astype(jnp.float32)
    values, scales = formats.quantize_rows(x, format.activations, format.group)
    blocks = values.astype(jnp.float32).reshape(*scales.shape, x.shape[-1] // scales.shape[-1]) * scales[..., None]
    return blocks.reshape(x.shape)
