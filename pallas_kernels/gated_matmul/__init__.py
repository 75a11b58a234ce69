"""activation(gate) * up, times a weight [out, in]: what ends a gated MLP."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...errors import KernelError
from ..dispatch import Implementation, KernelChoices, anywhere
from ..gated_activation import Activation
from ..made_for import made_for
from ..quantized_matmul import LayerOf, QuantizedWeight, Weight
from . import apart
from .contract import GatedMatmulProblem

__all__ = ["TABLE", "GatedMatmulProblem", "gated_matmul"]

# Hopper's is taken by name only (--kernels=gated_matmul:hopper) until it has been right on a GPU: its first form, with
# Pallas' own reduction, was not.
TABLE: tuple[Implementation[GatedMatmulProblem], ...] = (
    Implementation("apart", apart.gated_matmul, anywhere),
    made_for("hopper", __name__, "gated_matmul"),
)


def gated_matmul(
    gate: Float[Array, "*rows in"],
    up: Float[Array, "*rows in"],
    weight: Weight | LayerOf,
    *,
    activation: Activation,
    kernels: KernelChoices,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*rows out"]:
    """The transposed weight times activation(gate) * up, accumulated in float32, as out_dtype (gate's own if None).

    All of it lies on one device. Raises KernelError if the shapes or dtypes disagree or the implementation named cannot
    serve.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.shape[-1] != weight.shape[1]:
        raise KernelError(
            f"a weight [out, in] = {weight.shape} wants gate and up of its width and of one shape and dtype, got "
            f"{gate.dtype} {gate.shape} and {up.dtype} {up.shape}"
        )
    whole = weight.stack if isinstance(weight, LayerOf) else weight
    problem = GatedMatmulProblem(
        platform=kernels.platform,
        device_kind=kernels.device_kind,
        activation=activation,
        format=whole.format if isinstance(whole, QuantizedWeight) else None,
        dtype=gate.dtype.name,
        in_dim=gate.shape[-1],
        out_dim=weight.shape[0],
    )
    chosen = kernels.choose("gated_matmul", TABLE, problem)
    output: jax.Array = chosen.fn(
        gate, up, weight, activation=activation, kernels=kernels, out_dtype=out_dtype or gate.dtype
    )
    return output
