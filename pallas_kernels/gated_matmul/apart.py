"""The definition: one operation after the other, each as its own table says."""

import jax
from jax.typing import DTypeLike

from ..dispatch import KernelChoices
from ..gated_activation import Activation, gated_activation
from ..quantized_matmul import LayerOf, Weight, matmul


def gated_matmul(
    gate: jax.Array, up: jax.Array, weight: Weight | LayerOf, *, activation: Activation, kernels: KernelChoices,
    out_dtype: DTypeLike,
) -> jax.Array:  # fmt: skip
    """See the contract."""
    inner = gated_activation(gate, up, activation=activation, kernels=kernels)
    return matmul(inner, weight, kernels=kernels, out_dtype=out_dtype)
