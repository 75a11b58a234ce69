"""Mistral, every layer of which has the same window or none."""

from ..config import LayerSpec, ModelConfig
from .names import DENSE
from .reader import ConfigReader
from .rope import read_rope
from .shared import (
    DEFAULTS,
    Family,
    read_attention,
    read_heads,
    read_mlp,
    read_model,
    read_num_layers,
    read_uniform_window,
)


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that are all alike."""
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0)
    attention = read_attention(reader, rope=rope, window=read_uniform_window(reader))
    return read_model(
        reader, "mistral", [LayerSpec(attention=attention, mlp=read_mlp(reader))] * read_num_layers(reader)
    )


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    defaults={**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    config_from_hf=config_from_hf,
    sources=lambda model: DENSE,
)
