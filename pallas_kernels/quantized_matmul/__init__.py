"""Activations times a weight [out, in], plain or quantized: every linear layer."""

import math
from collections.abc import Sequence

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...errors import KernelError
from ..dispatch import Implementation, KernelChoices, anywhere
from ..made_for import made_for
from . import block_scaled, cpu, reference, xla
from .contract import FORMATS, LayerOf, MatmulProblem, QuantizedWeight, Weight, WeightFormat, sliced

__all__ = [
    "FORMATS",
    "TABLE",
    "LayerOf",
    "MatmulProblem",
    "QuantizedWeight",
    "Weight",
    "WeightFormat",
    "matmul",
    "matmuls",
]

TABLE: tuple[Implementation[MatmulProblem], ...] = (
    made_for("hopper", __name__, "matmul", several="matmuls"),
    made_for("blackwell", __name__, "matmul"),
    Implementation("block_scaled", block_scaled.matmul, block_scaled.unsupported),
    Implementation("cpu", cpu.matmul, cpu.unsupported, takes_stacks=True, several=cpu.matmuls),
    Implementation("xla", xla.matmul, anywhere),
    Implementation("reference", reference.matmul, anywhere),
)


def matmul(
    x: Float[Array, "*rows in"],
    weight: Weight | LayerOf,
    *,
    kernels: KernelChoices,
    out_dtype: DTypeLike | None = None,
    is_partitioned: bool = False,
) -> Float[Array, "*rows out"]:
    """x times the transposed weight, accumulated in float32, as out_dtype (x's own if None); differentiable in x
    and in a plain weight. `is_partitioned` says that its operands lie on several devices, and XLA is to split it.

    float32 means float32, no TF32; but Hopper's sums of products of fp8 with fp8 hold some 14 bits (WORKSPACE.md).
    Raises KernelError if the shapes disagree or the implementation cannot serve.
    """
    return matmuls(x, [weight], kernels=kernels, out_dtype=out_dtype, is_partitioned=is_partitioned)[0]


def matmuls(
    x: Float[Array, "*rows in"],
    weights: Sequence[Weight | LayerOf],
    *,
    kernels: KernelChoices,
    out_dtype: DTypeLike | None = None,
    is_partitioned: bool = False,
) -> list[Float[Array, "*rows out"]]:
    """As `matmul`, with each of some weights: at once where they are of one format and their implementation can."""
    problems = [_problem(x, weight, kernels, is_partitioned) for weight in weights]
    chosen = [kernels.choose("quantized_matmul", TABLE, problem) for problem in problems]
    options = {"platform": kernels.platform, "out_dtype": out_dtype or x.dtype}
    taken = [weight if one.takes_stacks else sliced(weight) for weight, one in zip(weights, chosen, strict=True)]
    kinds = {(one.name, problem.format, problem.weight_dtype) for one, problem in zip(chosen, problems, strict=True)}
    if len(kinds) == 1 and len(weights) > 1 and chosen[0].several is not None:
        return list(chosen[0].several(x, taken, **options))
    return [one.fn(x, weight, **options) for one, weight in zip(chosen, taken, strict=True)]


def _problem(x: Array, weight: Weight | LayerOf, kernels: KernelChoices, is_partitioned: bool) -> MatmulProblem:
    out_dim, in_dim = weight.shape
    if x.shape[-1] != in_dim:
        raise KernelError(f"a weight [out, in] = {weight.shape} wants activations of width {in_dim}, got {x.shape}")
    whole = weight.stack if isinstance(weight, LayerOf) else weight
    return MatmulProblem(
        platform=kernels.platform,
        format=whole.format if isinstance(whole, QuantizedWeight) else None,
        num_rows=math.prod(x.shape[:-1]),
        in_dim=in_dim,
        out_dim=out_dim,
        dtype=x.dtype.name,
        weight_dtype=None if isinstance(whole, QuantizedWeight) or whole.dtype == x.dtype else whole.dtype.name,
        device_kind=kernels.device_kind,
        is_partitioned=is_partitioned,
    )
