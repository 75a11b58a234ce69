"""The activations of gated MLPs, and what an implementation is asked."""

import dataclasses
from typing import Literal

from ..dispatch import Platform

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedActivationProblem:
    """What an implementation may be unable to serve."""

    platform: Platform
    activation: Activation
    dtype: str
    is_partitioned: bool  # whether XLA splits the operation over several devices
