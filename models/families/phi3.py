"""Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another; longrope; a part of each head may go unrotated."""

from ..config import LayerSpec, MlpSpec, ModelConfig
from .names import DENSE, LAYER, Names
from .reader import ConfigReader
from .rope import PHI3_KINDS, read_rope
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
from .source import Source

# Published checkpoints bring this code along; it computes what is computed here, and it is never run.
PUBLISHED_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": "Xenova/gpt-4o",
}


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Layers that are all alike."""
    code = reader.get("auto_map")
    if not isinstance(code, dict) or any(PUBLISHED_CODE.get(key) != value for key, value in code.items()):
        reader.expect("auto_map")
    rope = read_rope(reader, read_heads(reader)["head_dim"], theta=10_000.0, kinds=PHI3_KINDS, partial=True)
    reader.ignore("original_max_position_embeddings")  # longrope has read it, and no other kind needs it
    attention = read_attention(reader, rope=rope, window=read_uniform_window(reader))
    return read_model(reader, "phi3", [LayerSpec(attention=attention, mlp=read_mlp(reader))] * read_num_layers(reader))


def sources(model: ModelConfig) -> Names:
    """The rows of the fused tensors: q, then k, then v; gate, then up."""
    attention, mlp = model.layers[0].attention, model.layers[0].mlp
    assert isinstance(mlp, MlpSpec)
    q_end = attention.num_heads * attention.head_dim
    k_end = q_end + attention.num_kv_heads * attention.head_dim
    qkv, gate_up = (LAYER + "self_attn.qkv_proj.weight",), (LAYER + "mlp.gate_up_proj.weight",)
    return {
        **DENSE,
        "attention/q/weight": (Source(names=qkv, rows=slice(None, q_end)),),
        "attention/k/weight": (Source(names=qkv, rows=slice(q_end, k_end)),),
        "attention/v/weight": (Source(names=qkv, rows=slice(k_end, None)),),
        "mlp/gate/weight": (Source(names=gate_up, rows=slice(None, mlp.mlp_dim)),),
        "mlp/up/weight": (Source(names=gate_up, rows=slice(mlp.mlp_dim, None)),),
    }


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    # The last three are what Phi-4's own code reads and transformers does not.
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
    },
    config_from_hf=config_from_hf,
    sources=sources,
)
