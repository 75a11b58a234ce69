"""What an implementation of a gated MLP's down projection is asked."""

import dataclasses

from ..dispatch import Platform
from ..gated_activation.contract import Activation
from ..quantized_matmul.contract import WeightFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMatmulProblem:
    """What an implementation may be unable to serve."""

    platform: Platform
    device_kind: str
    activation: Activation
    format: WeightFormat | None  # of the weight; None: it is not quantized
    dtype: str  # of gate and up
    in_dim: int
    out_dim: int
