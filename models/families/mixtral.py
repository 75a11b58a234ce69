"""Mixtral: Mistral's attention, and experts in every layer."""

from ..config import LayerSpec, ModelConfig
from .names import ATTENTION, PRE_NORMS, TOP, Names, expert_names
from .reader import ConfigReader
from .rope import read_rope
from .shared import (
    DEFAULTS,
    Family,
    read_attention,
    read_heads,
    read_model,
    read_moe,
    read_num_layers,
    read_uniform_window,
)


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that are all alike; the weights of the picked experts sum to one."""
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=1_000_000.0)
    attention = read_attention(reader, rope=rope, window=read_uniform_window(reader))
    num_experts, mlp_dim = reader.integer("num_local_experts"), reader.integer("intermediate_size")
    layer = LayerSpec(attention=attention, mlp=read_moe(reader, num_experts=num_experts, mlp_dim=mlp_dim))
    return read_model(reader, "mixtral", [layer] * read_num_layers(reader))


def sources(model: ModelConfig) -> Names:
    """Experts as published, w1, w3 and w2, or as transformers 5 names them."""
    mlp_dim = model.layers[0].mlp.mlp_dim
    published = expert_names("block_sparse_moe", gate="w1", up="w3", down="w2", mlp_dim=mlp_dim)
    later = expert_names("mlp", gate="gate_proj", up="up_proj", down="down_proj", mlp_dim=mlp_dim)
    experts = {path: (*published[path], *later[path]) for path in published}
    return {**TOP, **ATTENTION, **PRE_NORMS, **experts}


FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    defaults={
        **DEFAULTS,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    config_from_hf=config_from_hf,
    sources=sources,
)
