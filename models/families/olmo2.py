"""OLMo 2: norms after each block only, q and k normalised over all heads at once."""

from ..config import LayerSpec, ModelConfig
from .names import ATTENTION, MLP, POST_NORMS, TOP
from .reader import ConfigReader
from .rope import read_rope
from .shared import DEFAULTS, Family, read_attention, read_heads, read_mlp, read_model, read_num_layers


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that are all alike."""
    bias = reader.flag("attention_bias")
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0)
    attention = read_attention(reader, rope=rope, qk_norm="full", qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(attention=attention, mlp=read_mlp(reader), norms="post")
    return read_model(reader, "olmo2", [layer] * read_num_layers(reader))


FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    defaults={**DEFAULTS, "rms_norm_eps": 1e-5},
    config_from_hf=config_from_hf,
    sources=lambda model: {**TOP, **ATTENTION, **MLP, **POST_NORMS},
)
