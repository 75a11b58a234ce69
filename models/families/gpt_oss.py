"""gpt-oss: attention sinks, biases everywhere, windows in every second layer, clamped experts, often in mxfp4."""

from collections.abc import Mapping
from typing import Any

from ..config import LayerSpec, ModelConfig, RopeSpec
from .names import ATTENTION, LAYER, PRE_NORMS, TOP, Names, layer_tensor
from .reader import ConfigReader
from .rope import SECTION_DEFAULTS, rope_from_section, rope_section
from .shared import DEFAULTS, Family, alternate, read_attention, read_heads, read_model, read_moe, read_windows
from .source import Source

DEFAULT_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)  # gate's rows, and up's


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Every second layer, from the first on, has a window."""
    bias = reader.flag("attention_bias")
    rope = _read_rope(reader, read_heads(reader)["head_dim"])
    attention = read_attention(reader, rope=rope, sinks=True, qkv_bias=bias, out_bias=bias)
    reader.expect("hidden_act", "silu")
    reader.expect("experts_per_token", reader.get("num_experts_per_tok"))  # published configs hold both
    moe = read_moe(
        reader,
        num_experts=reader.integer("num_local_experts"),
        mlp_dim=reader.integer("intermediate_size"),
        routing="topk_softmax",
        bias=True,
        clamp_limit=reader.number("swiglu_limit"),
        swiglu_alpha=reader.number("swiglu_alpha"),
    )
    windows = read_windows(reader, reader.integer("sliding_window"), lambda layer: layer % 2 == 0)
    layers = [LayerSpec(attention=each, mlp=moe) for each in alternate(attention, windows)]
    return read_model(reader, "gpt_oss", layers, default_dtype="bfloat16")  # published configs name none


def _read_rope(reader: ConfigReader, head_dim: int) -> RopeSpec:
    section = rope_section(reader)
    if not (reader.get("rope_parameters") or reader.get("rope_scaling")):
        section = ConfigReader(DEFAULT_ROPE, SECTION_DEFAULTS)
    rope = rope_from_section(reader, section, head_dim, theta=150_000.0)
    reader.expect("initial_context_length", rope.original_max_len)
    return rope


def _expert_weight(name: str, rows: slice = slice(None)) -> tuple[Source, ...]:
    """Plain as [experts, in, out]."""
    return (Source(names=(f"{LAYER}mlp.experts.{name}",), transpose=True, axis=1, rows=rows),)


def sources(model: ModelConfig) -> Names:
    """Gate and up alternate row by row in one tensor."""
    bias = LAYER + "mlp.experts.gate_up_proj_bias"
    return {
        **TOP,
        **ATTENTION,
        **PRE_NORMS,
        "attention/sinks": layer_tensor("self_attn.sinks"),
        "moe/router/weight": layer_tensor("mlp.router.weight"),
        "moe/router/bias": layer_tensor("mlp.router.bias"),
        "moe/gate/weight": _expert_weight("gate_up_proj", EVEN),
        "moe/up/weight": _expert_weight("gate_up_proj", ODD),
        "moe/down/weight": _expert_weight("down_proj"),
        "moe/gate/bias": (Source(names=(bias,), axis=1, rows=EVEN),),
        "moe/up/bias": (Source(names=(bias,), axis=1, rows=ODD),),
        "moe/down/bias": layer_tensor("mlp.experts.down_proj_bias"),
    }


FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    defaults={
        **DEFAULTS,
        "attention_bias": True,
        "head_dim": 64,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    config_from_hf=config_from_hf,
    sources=sources,
)
