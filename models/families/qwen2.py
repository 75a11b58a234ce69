"""Qwen2 and Qwen2.5: biases on q, k and v; windows from layer `max_window_layers` on, if switched on."""

from ..config import LayerSpec, ModelConfig
from .names import DENSE
from .reader import ConfigReader
from .rope import read_rope
from .shared import DEFAULTS, Family, alternate, read_attention, read_heads, read_mlp, read_model, read_windows


def read_upper_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """The windows of Qwen's layers: the lower `max_window_layers` attend to everything."""
    window = reader.optional_integer("sliding_window") if reader.flag("use_sliding_window") else None
    reader.ignore("sliding_window")
    first = reader.integer("max_window_layers", minimum=0)
    return read_windows(reader, window, lambda layer: layer >= first)


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that differ in their windows only."""
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0)
    attention = read_attention(reader, rope=rope, qkv_bias=True)
    mlp = read_mlp(reader)
    layers = [LayerSpec(attention=each, mlp=mlp) for each in alternate(attention, read_upper_windows(reader))]
    return read_model(reader, "qwen2", layers)


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    defaults={**DEFAULTS, "max_window_layers": 28, "sliding_window": 4096, "use_mrope": False},
    config_from_hf=config_from_hf,
    sources=lambda model: DENSE,
)
