"""Which of a model's axes split over which mesh, checked before anything is placed."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh

from ..sharding.axes import LogicalAxis
from ..sharding.check import Dimension, check_dimensions
from ..sharding.mesh import mesh_sizes
from ..sharding.rules import Placement
from .config import LayerSpec, ModelConfig, MoeSpec


def partition(config: ModelConfig, mesh: Mesh) -> Placement:
    """The placement of a model on a mesh. KV heads that are fewer than the tensor shards are replicated.

    Raises:
      ConfigError: a dimension that does not split, naming axis, size, mesh and the nearest meshes that fit.
    """
    sizes = mesh_sizes(mesh)
    check_dimensions(sizes, list(split_dimensions(config)))
    replicated: frozenset[LogicalAxis] = frozenset({"kv_heads"} if config.num_kv_heads % sizes["tensor"] else ())
    return Placement(mesh, replicated)


def split_dimensions(config: ModelConfig) -> Iterator[Dimension]:
    """What a mesh must split evenly; experts are not among it, for they have places (see `with_places`)."""
    yield Dimension(what="the vocabulary", axis="vocab", size=config.vocab_size)
    yield Dimension(what="the number of KV heads", axis="cache_heads", size=config.num_kv_heads, repeats=True)
    for layer in dict.fromkeys(config.layers):
        yield Dimension(what="the number of attention heads", axis="heads", size=layer.attention.num_heads)
        yield Dimension(what="the MLP width", axis="mlp", size=layer.mlp.mlp_dim)


def with_places(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The config as its decoder is built for a mesh: with as many places for experts as split over its devices."""
    num_parts = mesh_sizes(mesh)["expert"]

    def placed(layer: LayerSpec) -> LayerSpec:
        if not isinstance(layer.mlp, MoeSpec):
            return layer
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, num_expert_parts=num_parts))

    return dataclasses.replace(config, layers=tuple(map(placed, config.layers)))
