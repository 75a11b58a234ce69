"""The definition of a matmul with weights: everything in float32."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from .contract import QuantizedWeight, Weight


def matmul(x: jax.Array, weight: Weight, *, platform: Platform, out_dtype: DTypeLike) -> jax.Array:
    """See the contract; the weight is dequantized whole."""
    del platform
    product = jnp.einsum("...i,oi->...o", x.astype(jnp.float32), dequantize(weight), precision="highest")
    return product.astype(out_dtype)


def dequantize(weight: Weight) -> jax.Array:
    """The weight as a float32 array [out, in]."""
    if isinstance(weight, QuantizedWeight):
        return weight.values.astype(jnp.float32) * weight.scales[:, None]
    return weight.astype(jnp.float32)
