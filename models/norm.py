"""Root-mean-square normalisation (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..sharding.axes import LogicalAxis
from .config import ModelConfig


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last axis, computed in float32."""

    def __init__(self, dim: int, config: ModelConfig, *, axis: LogicalAxis = "embed", dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.full((dim,), 1.0 - config.norm_offset, dtype), axes=(axis,))
        self.eps = config.norm_eps
        self.offset = config.norm_offset

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        wide = x.astype(jnp.float32)
        scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (scaled * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)
