"""Llama 2, 3, 3.1, 3.2 and 3.3."""

from ..config import LayerSpec, ModelConfig
from .names import DENSE
from .reader import ConfigReader
from .rope import read_rope
from .shared import DEFAULTS, Family, read_attention, read_heads, read_mlp, read_model, read_num_layers


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that are all alike, with one rope of any kind."""
    bias = reader.flag("attention_bias")
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0)
    reader.expect("max_sequence_length", reader.get("max_position_embeddings"))  # the first Llamas wrote both
    layer = LayerSpec(
        attention=read_attention(reader, rope=rope, qkv_bias=bias, out_bias=bias),
        mlp=read_mlp(reader, bias=reader.flag("mlp_bias")),
    )
    return read_model(reader, "llama", [layer] * read_num_layers(reader))


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    defaults=DEFAULTS,
    config_from_hf=config_from_hf,
    sources=lambda model: DENSE,
    ignored_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",),  # a constant that old versions saved
)
