"""The definition of a grouped matmul: every row times every group's weight, all but its own thrown away."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import Platform
from ..quantized_matmul import QuantizedWeight
from ..quantized_matmul.reference import dequantize, rounded


def grouped_matmul(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    group_sizes: jax.Array,
    *,
    platform: Platform,
    out_dtype: DTypeLike,
) -> jax.Array:
    """See the contract; E times the work, one group at a time so that memory stays small."""
    del platform
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")  # E for rows beyond the sum

    def add_group(total: jax.Array, item: tuple[jax.Array, jax.Array | QuantizedWeight]) -> tuple[jax.Array, None]:
        index, one = item
        rows = rounded(x, one) if isinstance(one, QuantizedWeight) else x.astype(jnp.float32)
        product = jnp.einsum("mi,oi->mo", rows, dequantize(one), precision="highest")
        return total + jnp.where((group == index)[:, None], product, 0.0), None

    zeros = jnp.zeros((x.shape[0], weight.shape[1]), jnp.float32)
    total, _ = jax.lax.scan(add_group, zeros, (jnp.arange(weight.shape[0]), weight))
    return total.astype(out_dtype)
