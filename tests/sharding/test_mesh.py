"""Meshes and the placement of a model on one: errors name the axis, the size and what fits."""

import pytest

from millrace import ConfigError
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig
from millrace.models.kv_cache import num_cache_heads
from millrace.models.partition import partition, split_dimensions
from millrace.sharding.axes import MeshAxis
from millrace.sharding.check import check_dimensions, nearest_meshes
from millrace.sharding.mesh import make_mesh, mesh_text


def config(num_heads: int = 8, num_kv_heads: int = 2, vocab_size: int = 64, mlp_dim: int = 32) -> ModelConfig:
    attention = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=8, scale=1.0, rope=None)
    layer = LayerSpec(attention=attention, mlp=MlpSpec(mlp_dim=mlp_dim))
    return ModelConfig(family="llama", vocab_size=vocab_size, embed_dim=16, layers=(layer,), max_context_len=32)


def test_absent_axes_have_size_1() -> None:
    assert dict(make_mesh({"tensor": 2}).shape) == {"data": 1, "tensor": 2, "expert": 1}


@pytest.mark.parametrize("sizes", [{"tensr": 2}, {"data": 0}, {"data": True}, {"data": 9}])
def test_a_wrong_mesh_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        make_mesh(sizes)


def test_a_dimension_that_does_not_split_is_named() -> None:
    message = r"vocabulary .vocab. is 63.*tensor of 2 devices .mesh tensor=2.*that fit: data=2; expert=2\."
    with pytest.raises(ConfigError, match=message):
        partition(config(vocab_size=63), make_mesh({"tensor": 2}))


def test_the_nearest_meshes_of_as_many_devices_fit_every_dimension() -> None:
    dimensions = list(split_dimensions(config(num_heads=64, num_kv_heads=8, vocab_size=32000, mlp_dim=28672)))
    wanted: dict[MeshAxis, int] = {"data": 12, "expert": 1, "tensor": 6}
    fitting = [mesh_text(mesh) for mesh in nearest_meshes(wanted, dimensions)]
    assert fitting[:2] == ["data=9,tensor=8", "data=18,tensor=4"] and "data=72" in fitting
    with pytest.raises(ConfigError, match="data=12,tensor=6.*Nearest meshes that fit: data=9,tensor=8; data=18"):
        check_dimensions(wanted, dimensions)


def test_more_devices_than_there_are_are_refused_by_number() -> None:
    with pytest.raises(ConfigError, match="mesh data=3,tensor=4 needs 12 devices; 8 cpu devices are here"):
        make_mesh({"data": 3, "tensor": 4})


def test_the_devices_of_an_expert_axis_are_data_shards_that_share_only_experts() -> None:
    placement = partition(config(), make_mesh({"data": 2, "expert": 2, "tensor": 2}))
    assert placement.num_shards == 4
    assert placement.sharding(("experts", "mlp", "embed")).shard_shape((6, 32, 16)) == (3, 16, 16)
    assert placement.sharding(("shard", "vocab")).shard_shape((4, 64)) == (1, 32)


def test_few_kv_heads_are_repeated_one_for_each_tensor_shard() -> None:
    placement = partition(config(), make_mesh({"tensor": 4}))
    assert num_cache_heads(config(), placement) == 4
    assert placement.spec(("kv_heads", "embed")) == placement.spec((None, None))


def test_kv_heads_that_neither_split_nor_repeat_are_refused() -> None:
    with pytest.raises(ConfigError, match="KV heads .cache_heads. is 3, which does not split.*nor repeat evenly"):
        partition(config(num_heads=12, num_kv_heads=3), make_mesh({"tensor": 4}))


def test_equal_shardings_are_one_object() -> None:
    placement = partition(config(), make_mesh({"data": 2}))
    assert placement.sharding(("shard", None)) is placement.sharding(("shard", None))
