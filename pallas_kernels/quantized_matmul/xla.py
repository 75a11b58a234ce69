"""One XLA dot over the last axes, accumulated in float32; quantized values enter it converted, their scales come after.

On the CPU a bfloat16 dot of one row first converts the whole weight to float32 (22 ms for 2048 x 8192, where two rows
take 2.7), so one row goes as two; float32 has no such trap. Int8 values are converted whole there, which is slow:
right, not yet fast.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from .contract import QuantizedWeight, Weight


def matmul(x: jax.Array, weight: Weight, *, platform: Platform, out_dtype: DTypeLike) -> jax.Array:
    """See the contract."""
    if x.ndim == 1:
        return matmul(x[None], weight, platform=platform, out_dtype=out_dtype)[0]
    if platform == "cpu" and x.shape[-2] == 1 and x.dtype != jnp.float32:
        twice = jnp.broadcast_to(x, (*x.shape[:-2], 2, x.shape[-1]))
        return matmul(twice, weight, platform=platform, out_dtype=out_dtype)[..., :1, :]
    if isinstance(weight, QuantizedWeight):
        product = _dot(x, weight.values.astype(x.dtype)) * weight.scales
    else:
        product = _dot(x, weight)
    return product.astype(out_dtype)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """[..., in] and [out, in] to float32 [..., out]."""
    # HIGHEST keeps a GPU from rounding float32 to TF32; it changes nothing on a CPU, nor for bfloat16.
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
