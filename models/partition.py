"""Which of a model's axes split over which mesh, checked before anything is placed."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh

from ..sharding.axes import LogicalAxis
from ..sharding.check import Dimension, check_dimensions
from ..sharding.mesh import mesh_sizes
from ..sharding.rules import Placement
from .config import LayerSpec, ModelConfig, MoeSpec
from .quantization import HEAD, quantized_projections


def partition(config: ModelConfig, mesh: Mesh) -> Placement:
    """The placement of a model on a mesh. KV heads that are fewer than the tensor shards are replicated.

    Raises:
      ConfigError: a dimension that does not split, naming axis, size, mesh and the nearest meshes that fit.
    """
    sizes = mesh_sizes(mesh)
    dimensions = list(split_dimensions(config))
    if config.num_kv_heads % sizes["tensor"] == 0:
        dimensions += _kv_dimensions(config)
    check_dimensions(sizes, dimensions)
    replicated: frozenset[LogicalAxis] = frozenset({"kv_heads"} if config.num_kv_heads % sizes["tensor"] else ())
    return Placement(mesh, replicated)


def split_dimensions(config: ModelConfig) -> Iterator[Dimension]:
    """What a mesh must split evenly; experts are not among it, for they have places (see `with_places`)."""
    yield Dimension(what="the vocabulary", axis="vocab", size=config.vocab_size)
    yield Dimension(what="the number of KV heads", axis="cache_heads", size=config.num_kv_heads, repeats=True)
    for layer in dict.fromkeys(config.layers):
        yield Dimension(what="the number of attention heads", axis="heads", size=layer.attention.num_heads)
        yield Dimension(what="the MLP width", axis="mlp", size=layer.mlp.mlp_dim)
    yield from _quantized_dimensions(config)


def _quantized_dimensions(config: ModelConfig) -> Iterator[Dimension]:
    """The groups and blocks of quantized weights: what shares a scale stays together."""
    axes: dict[str, tuple[LogicalAxis, LogicalAxis]] = {
        "q": ("heads", "embed"), "o": ("embed", "heads"), "gate": ("mlp", "embed"), "up": ("mlp", "embed"),
        "down": ("embed", "mlp"), HEAD: ("vocab", "embed"),
    }  # fmt: skip
    for path, format, (out_dim, in_dim) in quantized_projections(config):
        name = path.rpartition("/")[2]
        if name not in axes:
            continue  # k and v are repeated whole where their heads do not split: see below
        out_axis, in_axis = axes[name]
        if format.group is not None:
            what = f"the number of groups of {format.group} inputs of {path}"
            yield Dimension(what=what, axis=in_axis, size=in_dim // format.group)
        if format.block_rows > 1:
            what = f"the number of blocks of {format.block_rows} outputs of {path}"
            yield Dimension(what=what, axis=out_axis, size=out_dim // format.block_rows)


def _kv_dimensions(config: ModelConfig) -> Iterator[Dimension]:
    """The blocks of keys' and values' projections, where their heads are split."""
    for path, format, (out_dim, _) in quantized_projections(config):
        if path in ("attention/k", "attention/v") and format.block_rows > 1:
            what = f"the number of blocks of {format.block_rows} outputs of {path}"
            yield Dimension(what=what, axis="kv_heads", size=out_dim // format.block_rows)


def with_places(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The config as its decoder is built for a mesh: with as many places for experts as split over its devices."""
    num_parts = mesh_sizes(mesh)["expert"]

    def placed(layer: LayerSpec) -> LayerSpec:
        if not isinstance(layer.mlp, MoeSpec):
            return layer
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, num_expert_parts=num_parts))

    return dataclasses.replace(config, layers=tuple(map(placed, config.layers)))
