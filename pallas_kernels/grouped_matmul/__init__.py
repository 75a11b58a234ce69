"""Rows sorted by group times the weight of their group: the experts of a mixture."""

import dataclasses

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from ...errors import KernelError
from ..dispatch import Implementation, KernelChoices, Platform, anywhere
from ..made_for import made_for
from ..quantized_matmul import QuantizedWeight, WeightFormat
from . import reference, xla

__all__ = ["TABLE", "GroupedMatmulProblem", "Weight", "grouped_matmul"]

Weight = Float[Array, "E out in"] | QuantizedWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedMatmulProblem:
    """What an implementation may be unable to serve."""

    platform: Platform
    format: WeightFormat | None  # None: plain weights
    num_groups: int
    num_rows: int
    in_dim: int
    out_dim: int
    dtype: str
    device_kind: str = ""  # what jax calls the devices


TABLE: tuple[Implementation[GroupedMatmulProblem], ...] = (
    made_for("hopper", __name__, "grouped_matmul"),
    made_for("blackwell", __name__, "grouped_matmul"),
    Implementation("xla", xla.grouped_matmul, anywhere),
    Implementation("reference", reference.grouped_matmul, anywhere),
)


def grouped_matmul(
    x: Float[Array, "M in"],
    weight: Weight,
    group_sizes: Int32[Array, " E"],
    *,
    kernels: KernelChoices,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "M out"]:
    """Row m times the transposed weight of its group; rows are sorted by group and group e has group_sizes[e] of them.

    Accumulated in float32 (no TF32), as out_dtype (x's own if None); differentiable where the weight is plain. Rows
    beyond the sum of the sizes give zeros. Raises KernelError if the shapes disagree or the implementation cannot
    serve.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or group_sizes.shape != weight.shape[:1]:
        raise KernelError(
            f"expected x [M, in], weight [E, out, in] and sizes [E], got {x.shape}, {weight.shape}, {group_sizes.shape}"
        )
    problem = GroupedMatmulProblem(
        platform=kernels.platform,
        format=weight.format if isinstance(weight, QuantizedWeight) else None,
        num_groups=weight.shape[0],
        num_rows=x.shape[0],
        in_dim=x.shape[1],
        out_dim=weight.shape[1],
        dtype=x.dtype.name,
        device_kind=kernels.device_kind,
    )
    chosen = kernels.choose("grouped_matmul", TABLE, problem)
    output: jax.Array = chosen.fn(x, weight, group_sizes, platform=kernels.platform, out_dtype=out_dtype or x.dtype)
    return output
