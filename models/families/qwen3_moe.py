"""Qwen3-MoE: Qwen3's attention; each layer dense or sparse, by `mlp_only_layers` and `decoder_sparse_step`."""

from ..config import LayerSpec, MlpSpec, ModelConfig, MoeSpec
from .names import DENSE, Names, expert_names
from .reader import ConfigReader, agreed
from .rope import read_rope
from .shared import DEFAULTS, Family, read_attention, read_heads, read_mlp, read_model, read_moe, read_num_layers


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that differ in their MLPs only; a window, if switched on, is every layer's."""
    bias = reader.flag("attention_bias")
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0)
    window = reader.optional_integer("sliding_window") if reader.flag("use_sliding_window") else None
    reader.ignore("sliding_window", "max_window_layers")
    attention = read_attention(reader, rope=rope, qk_norm="head", qkv_bias=bias, out_bias=bias, window=window)
    layers = [LayerSpec(attention=attention, mlp=mlp) for mlp in _read_mlps(reader)]
    return read_model(reader, "qwen3_moe", layers)


def _read_mlps(reader: ConfigReader) -> list[MlpSpec | MoeSpec]:
    num_layers, step = read_num_layers(reader), reader.integer("decoder_sparse_step")
    dense_layers = reader.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or not all(type(i) is int and 0 <= i < num_layers for i in dense_layers):
        raise reader.wrong("mlp_only_layers", f"a list of layer numbers below {num_layers}")
    keys = ("num_experts", "num_local_experts")
    num_experts = agreed([(key, reader.optional_integer(key, minimum=0)) for key in keys], reader.where)
    num_experts = 128 if num_experts is None else num_experts
    sparse = {i for i in range(num_layers) if num_experts and i not in dense_layers and (i + 1) % step == 0}
    normalize, mlp_dim = reader.flag("norm_topk_prob"), reader.integer("moe_intermediate_size")
    moe = read_moe(reader, num_experts=num_experts, mlp_dim=mlp_dim, normalize=normalize) if sparse else None
    dense = read_mlp(reader)
    reader.ignore("num_experts_per_tok")  # where every layer is dense
    return [moe if moe is not None and i in sparse else dense for i in range(num_layers)]


def sources(model: ModelConfig) -> Names:
    """Both kinds of MLP have the same names, the experts' with their number."""
    mlp_dim = next((layer.mlp.mlp_dim for layer in model.layers if isinstance(layer.mlp, MoeSpec)), 0)
    return {**DENSE, **expert_names("mlp", gate="gate_proj", up="up_proj", down="down_proj", mlp_dim=mlp_dim)}


FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    defaults={
        **DEFAULTS,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    config_from_hf=config_from_hf,
    sources=sources,
)
