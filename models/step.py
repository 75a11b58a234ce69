"""What every layer of a step shares: where it runs, which kernels it may call, and the step's positions."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
from jaxtyping import Array, Float, Int

from ..pallas_kernels.dispatch import KernelChoices
from ..pallas_kernels.paged_attention import KvCache
from ..sharding.rules import Placement
from .config import AttentionSpec, ModelConfig, RopeSpec
from .rope import RopeTable, table


class Attend(Protocol):
    """How queries meet keys: over the paged cache when serving, over the sequence itself when training."""

    def __call__(
        self, q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"],
        cache: KvCache[Array] | None, layer: jax.Array, spec: AttentionSpec, sinks: Float[Array, " N"] | None,
    ) -> tuple[Float[Array, "R T N H"], KvCache[Array] | None]:  # fmt: skip
        """The attended values, and the cache that holds this step's keys and values too."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Built while a program is traced; lives only inside it."""

    placement: Placement
    kernels: KernelChoices
    attend: Attend
    ropes: Mapping[RopeSpec, RopeTable]

    @property
    def is_partitioned(self) -> bool:
        """Whether XLA splits over several devices what is not mapped over shards."""
        return self.placement.mesh.size > 1


def rope_tables(config: ModelConfig, positions: Int[Array, "R T"], max_context_len: int) -> dict[RopeSpec, RopeTable]:
    """One table for each distinct rope of the model."""
    specs = dict.fromkeys(layer.attention.rope for layer in config.layers)
    return {spec: table(spec, positions, max_context_len) for spec in specs if spec is not None}
