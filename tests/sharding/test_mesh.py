"""Meshes and the placement of a model on one: errors name the axis, the size and what fits."""

import pytest

from millrace import ConfigError
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig
from millrace.models.kv_cache import num_cache_heads
from millrace.models.partition import partition
from millrace.sharding.mesh import make_mesh


def config(num_heads: int = 8, num_kv_heads: int = 2, vocab_size: int = 64) -> ModelConfig:
    attention = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=8, scale=1.0, rope=None)
    layer = LayerSpec(attention=attention, mlp=MlpSpec(mlp_dim=32))
    return ModelConfig(family="llama", vocab_size=vocab_size, embed_dim=16, layers=(layer,), max_context_len=32)


def test_absent_axes_have_size_1() -> None:
    assert dict(make_mesh({"tensor": 2}).shape) == {"data": 1, "tensor": 2, "expert": 1}


@pytest.mark.parametrize("sizes", [{"tensr": 2}, {"data": 0}, {"data": True}, {"data": 9}])
def test_a_wrong_mesh_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        make_mesh(sizes)


def test_a_dimension_that_does_not_split_is_named() -> None:
    with pytest.raises(ConfigError, match=r"vocabulary .vocab. is 63.*tensor of 2 devices.*fit: 1"):
        partition(config(vocab_size=63), make_mesh({"tensor": 2}))


def test_few_kv_heads_are_repeated_one_for_each_tensor_shard() -> None:
    placement = partition(config(), make_mesh({"tensor": 4}))
    assert num_cache_heads(config(), placement) == 4
    assert placement.spec(("kv_heads", "embed")) == placement.spec((None, None))


def test_kv_heads_that_neither_split_nor_repeat_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 KV heads"):
        partition(config(num_heads=12, num_kv_heads=3), make_mesh({"tensor": 4}))


def test_equal_shardings_are_one_object() -> None:
    placement = partition(config(), make_mesh({"data": 2}))
    assert placement.sharding(("shard", None)) is placement.sharding(("shard", None))
