"""Which of a model's axes split over which mesh, checked before anything is placed."""

from jax.sharding import Mesh

from ..sharding.axes import LogicalAxis
from ..sharding.check import check_divisible
from ..sharding.rules import Placement
from .config import MlpSpec, ModelConfig
from .kv_cache import num_cache_heads


def partition(config: ModelConfig, mesh: Mesh) -> Placement:
    """The placement of a model on a mesh. KV heads that are fewer than the tensor shards are replicated.

    Raises:
      ConfigError: a dimension that does not split, naming axis, size and mesh.
    """
    tensor = int(mesh.shape["tensor"])
    replicated: frozenset[LogicalAxis] = frozenset({"kv_heads"} if config.num_kv_heads % tensor else ())
    placement = Placement(mesh, replicated)
    num_cache_heads(config, placement)
    check_divisible(placement, "vocab", config.vocab_size, "the vocabulary")
    for layer in config.layers:
        check_divisible(placement, "heads", layer.attention.num_heads, "the number of attention heads")
        check_divisible(placement, "mlp", layer.mlp.mlp_dim, "the MLP width")
        if not isinstance(layer.mlp, MlpSpec):
            check_divisible(placement, "experts", layer.mlp.num_experts, "the number of experts")
    return placement
