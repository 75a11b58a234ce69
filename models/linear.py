"""The linear layer, weights [out, in]."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..pallas_kernels.quantized_matmul import matmul
from ..sharding.axes import LogicalAxis
from .step import Step


def init_weight(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Normal noise of variance 1 / fan-in, the last axis being the input."""
    return jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(shape[-1])


class Linear(nnx.Module):
    """x @ weight.T + bias; `axes` names (out, in)."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[LogicalAxis | None, LogicalAxis], *, bias: bool, dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.weight = nnx.Param(init_weight(rngs, shape, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[:1], dtype), axes=axes[:1]) if bias else None

    def __call__(self, x: Float[Array, "*rows in"], step: Step) -> Float[Array, "*rows out"]:
        y = matmul(x, self.weight[...], kernels=step.kernels)
        return y if self.bias is None else y + self.bias[...]
