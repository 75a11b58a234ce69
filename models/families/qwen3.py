"""Qwen3: q and k normalised over each head."""

from ..config import LayerSpec, ModelConfig
from .names import DENSE
from .qwen2 import read_upper_windows
from .reader import ConfigReader
from .rope import read_rope
from .shared import DEFAULTS, Family, alternate, read_attention, read_heads, read_mlp, read_model


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that differ in their windows only."""
    bias = reader.flag("attention_bias")
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0)
    attention = read_attention(reader, rope=rope, qk_norm="head", qkv_bias=bias, out_bias=bias)
    mlp = read_mlp(reader)
    layers = [LayerSpec(attention=each, mlp=mlp) for each in alternate(attention, read_upper_windows(reader))]
    return read_model(reader, "qwen3", layers)


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    defaults={**DEFAULTS, "head_dim": 128, "max_window_layers": 28, "sliding_window": 4096},
    config_from_hf=config_from_hf,
    sources=lambda model: DENSE,
)
