"""What lies between the matmuls of a gated MLP: activation(gate) * up."""

import jax
from jaxtyping import Array, Float

from ...errors import KernelError
from ..dispatch import Implementation, KernelChoices, anywhere
from . import cpu, reference
from .contract import Activation, GatedActivationProblem

__all__ = ["TABLE", "Activation", "GatedActivationProblem", "gated_activation"]

TABLE: tuple[Implementation[GatedActivationProblem], ...] = (
    Implementation("cpu", cpu.gated_activation, cpu.unsupported),
    Implementation("xla", reference.gated_activation, anywhere),
)


def gated_activation(
    gate: Float[Array, "*rows F"],
    up: Float[Array, "*rows F"],
    *,
    activation: Activation,
    kernels: KernelChoices,
    is_partitioned: bool = False,
) -> Float[Array, "*rows F"]:
    """activation(gate) * up in their dtype; differentiable. `is_partitioned` says that they lie on several devices,
    and XLA is to split the operation.

    Raises KernelError if shapes or dtypes differ, or the implementation named cannot serve.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelError(
            f"expected gate and up of one shape and dtype, got {gate.dtype} {gate.shape} and {up.dtype} {up.shape}"
        )
    problem = GatedActivationProblem(
        platform=kernels.platform, activation=activation, dtype=gate.dtype.name, is_partitioned=is_partitioned
    )
    chosen = kernels.choose("gated_activation", TABLE, problem)
    output: jax.Array = chosen.fn(gate, up, activation=activation)
    return output
