"""The weights that a matmul takes: a plain array, or a quantized one."""

import dataclasses
from typing import Literal

import jax
from jaxtyping import Array, Float, Int8

from ..dispatch import Platform

Format = Literal["plain", "int8_channel"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] as int8 values times one float32 scale per output channel (format "int8_channel")."""

    values: Int8[Array, "out in"]
    scales: Float[Array, " out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.values.shape


Weight = Float[Array, "out in"] | QuantizedWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulProblem:
    """What an implementation may be unable to serve."""

    platform: Platform
    format: Format
    in_dim: int
    out_dim: int
    dtype: str  # of the activations
