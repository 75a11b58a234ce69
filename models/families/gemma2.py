"""Gemma 2: local and global layers in turn, soft caps, four norms around (1 + weight), scaled embeddings."""

import math
from typing import Any

from ..config import LayerSpec, ModelConfig
from .names import ATTENTION, MLP, SANDWICH_NORMS, TOP
from .reader import ConfigReader
from .rope import read_rope
from .shared import DEFAULTS, Family, alternate, read_attention, read_heads, read_mlp, read_model, read_windows

GEMMA_DEFAULTS = {
    **DEFAULTS,
    "head_dim": 256,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}


def read_gemma_attention(reader: ConfigReader) -> dict[str, Any]:
    """What Gemma's attentions share, as AttentionSpec's fields."""
    bias = reader.flag("attention_bias")
    reader.expect("hidden_act", reader.get("hidden_activation"))  # published configs hold both
    reader.expect("use_bidirectional_attention", False)
    return {"scale": reader.number("query_pre_attn_scalar") ** -0.5, "qkv_bias": bias, "out_bias": bias}


def read_gemma_model(reader: ConfigReader, family: str, layers: list[LayerSpec]) -> ModelConfig:
    """The model around Gemma's layers."""
    return read_model(
        reader,
        family,
        layers,
        norm_offset=1.0,
        embed_scale=math.sqrt(reader.integer("hidden_size")),
        final_soft_cap=reader.optional_number("final_logit_softcapping"),
    )


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Every second layer, from the first on, has a window."""
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0)
    cap = reader.optional_number("attn_logit_softcapping")
    attention = read_attention(reader, rope=rope, soft_cap=cap, **read_gemma_attention(reader))
    mlp = read_mlp(reader, activation_key="hidden_activation")
    windows = read_windows(reader, reader.integer("sliding_window"), lambda layer: layer % 2 == 0)
    layers = [LayerSpec(attention=each, mlp=mlp, norms="sandwich") for each in alternate(attention, windows)]
    return read_gemma_model(reader, "gemma2", layers)


FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    defaults={**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    config_from_hf=config_from_hf,
    sources=lambda model: {**TOP, **ATTENTION, **MLP, **SANDWICH_NORMS},
)
