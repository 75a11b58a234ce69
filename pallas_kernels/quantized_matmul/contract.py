"""The weights that a matmul takes: a plain array, or a quantized one of a format that its names say.

Dequantized, a weight is (stored value, minus its zero point or 8 for uint4) * scale of its group * global scale, plus
the offset of its group.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from ..dispatch import Platform

Storage = Literal["int8", "float8_e4m3fn", "uint4", "float4_e2m1"]
ScaleDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu"]
ActivationDtype = Literal["own", "int8", "float8_e4m3fn"]

# The largest value of each storage; uint4 without zero points stands for -8..7.
MAX_VALUE: Mapping[str, float] = types.MappingProxyType(
    {"int8": 127.0, "float8_e4m3fn": 448.0, "uint4": 7.0, "float4_e2m1": 6.0}
)
UINT4_OFFSET = 8  # what stands for zero in uint4 without zero points


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a weight [out, in] is quantized: names, not numbers; hashable, static in jit.

    Activations that are not their "own" are quantized on the fly with a scale for each row, or, where the weight has
    groups, for each row and group of inputs: max|x| / 127 or / 448.
    """

    name: str  # as in FORMATS; other group sizes keep it
    storage: Storage  # 4-bit ones lie two in a byte, the even input in the low nibble
    group: int | None = None  # inputs that share a scale; None: all of a row
    block_rows: int = 1  # output channels that share a scale
    scale: ScaleDtype = "float32"
    zeros: bool = False  # uint4 only: a zero point for each scale, 0..15, stored one a byte
    activations: ActivationDtype = "own"
    global_scale: bool = False  # one more float32 for the whole weight
    offsets: bool = False  # a number for each scale, in its dtype, that is added after it; nothing is rounded to such

    @property
    def is_packed(self) -> bool:
        """Whether two values lie in a byte."""
        return self.storage in ("uint4", "float4_e2m1")

    @property
    def bits(self) -> int:
        """Of one stored value."""
        return 4 if self.is_packed else 8

    @property
    def values_dtype(self) -> np.dtype:
        """Of the array that holds the values."""
        return np.dtype(jnp.dtype("uint8" if self.is_packed else self.storage))

    @property
    def scales_dtype(self) -> np.dtype:
        """Of the array of scales."""
        return np.dtype(jnp.dtype(self.scale))

    def values_shape(self, out_dim: int, in_dim: int) -> tuple[int, int]:
        """Of the values of one weight."""
        return out_dim, in_dim // 2 if self.is_packed else in_dim

    def scales_shape(self, out_dim: int, in_dim: int) -> tuple[int, int]:
        """Of the scales (zero points, offsets) of one weight; `misfit` says whether there are any."""
        return out_dim // self.block_rows, 1 if self.group is None else in_dim // self.group

    def misfit(self, out_dim: int, in_dim: int) -> str | None:
        """Why a weight [out, in] cannot have this format, None if it can."""
        if self.group is not None and in_dim % self.group:
            return f"its {in_dim} inputs do not divide into groups of {self.group}"
        if self.is_packed and in_dim % 2:
            return f"its {in_dim} inputs are odd, and two lie in a byte"
        if out_dim % self.block_rows:
            return f"its {out_dim} outputs do not divide into blocks of {self.block_rows}"
        return None


def _formats() -> dict[str, WeightFormat]:
    int8 = WeightFormat(name="int8", storage="int8", activations="int8")
    int4 = WeightFormat(name="int4", storage="uint4", group=64, scale="bfloat16")
    fp8 = WeightFormat(name="fp8", storage="float8_e4m3fn", activations="float8_e4m3fn")
    formats = (
        int8,
        dataclasses.replace(int8, name="int8_a16", activations="own"),
        fp8,
        dataclasses.replace(fp8, name="fp8_a16", activations="own"),
        dataclasses.replace(fp8, name="fp8_block", group=128, block_rows=128),  # arXiv:2412.19437, 3.3
        int4,
        dataclasses.replace(int4, name="int4_a8", activations="int8"),
        # OCP Microscaling Formats (MX) 1.0
        WeightFormat(name="mxfp4", storage="float4_e2m1", group=32, scale="float8_e8m0fnu"),
        WeightFormat(name="mxfp8", storage="float8_e4m3fn", group=32, scale="float8_e8m0fnu"),
        WeightFormat(name="nvfp4", storage="float4_e2m1", group=16, scale="float8_e4m3fn", global_scale=True),
    )
    return {each.name: each for each in formats}


FORMATS: Mapping[str, WeightFormat] = types.MappingProxyType(_formats())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight [*lead, out, in] in a format; lead is () in a linear layer, (E,) for experts."""

    values: Shaped[Array, "*lead out stored_in"]
    scales: Shaped[Array, "*lead blocks groups"]
    zeros: UInt8[Array, "*lead blocks groups"] | None = None
    global_scale: Float[Array, "*lead"] | None = None
    offsets: Float[Array, "*lead blocks groups"] | None = None
    format: WeightFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(*lead, out, in)."""
        *lead, stored_in = self.values.shape
        return (*lead, stored_in * 2 if self.format.is_packed else stored_in)

    @property
    def ndim(self) -> int:
        """Axes of `shape`."""
        return len(self.shape)


Weight = Float[Array, "out in"] | QuantizedWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOf:
    """One layer's weight [out, in] in a stack [L, out, in], for kernels that find it themselves."""

    stack: Weight  # every array of it with an axis of layers in front
    layer: Int32[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.stack.shape[1:]


def sliced(weight: Weight | LayerOf) -> Weight:
    """The weight itself, cut out of its stack where it lies in one."""
    if not isinstance(weight, LayerOf):
        return weight
    cut: Weight = jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, weight.layer, keepdims=False), weight.stack
    )
    return cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulProblem:
    """What an implementation may be unable to serve, or serve worse than the next."""

    platform: Platform
    format: WeightFormat | None  # None: a plain weight
    num_rows: int  # of activations, all leading axes together
    in_dim: int
    out_dim: int
    dtype: str  # of the activations
    device_kind: str = ""  # what jax calls the devices
    is_partitioned: bool = False  # whether XLA splits the matmul over several devices, its operands being whole here
