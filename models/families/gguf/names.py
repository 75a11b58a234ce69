"""The names that llama.cpp gives to tensors: tables of parameter path -> spellings, by architecture."""

from ...config import ModelConfig
from ..names import Names
from ..source import Source
from .packing import Plain

_LAYER = "blk.{layer}."
_PLAIN = Plain()


def _tensor(name: str, packing: Plain = _PLAIN) -> tuple[Source, ...]:
    return (Source(names=(name,), packing=packing),)


def _layer(name: str, packing: Plain = _PLAIN) -> tuple[Source, ...]:
    return _tensor(_LAYER + name, packing)


def _linear(path: str, name: str, packing: Plain = _PLAIN) -> dict[str, tuple[Source, ...]]:
    return {f"{path}/{leaf}": _layer(f"{name}.{leaf}", packing) for leaf in ("weight", "bias")}


def _norms(packing: Plain, **names: str) -> dict[str, tuple[Source, ...]]:
    return {f"{path}/scale": _layer(f"{name}.weight", packing) for path, name in names.items()}


_TOP: Names = {
    "embed/weight": _tensor("token_embd.weight"),
    "final_norm/scale": _tensor("output_norm.weight"),
    "head/weight": _tensor("output.weight"),
}
_ATTENTION: Names = {
    **_linear("attention/q", "attn_q"),
    **_linear("attention/k", "attn_k"),
    **_linear("attention/v", "attn_v"),
    **_linear("attention/o", "attn_output"),
    "attention/q_norm/scale": _layer("attn_q_norm.weight"),
    "attention/k_norm/scale": _layer("attn_k_norm.weight"),
}
_MLP: Names = {
    **_linear("mlp/gate", "ffn_gate"),
    **_linear("mlp/up", "ffn_up"),
    **_linear("mlp/down", "ffn_down"),
}
_DENSE: Names = {**_TOP, **_ATTENTION, **_MLP, **_norms(_PLAIN, attention_norm="attn_norm", mlp_norm="ffn_norm")}


def _experts(name: str) -> tuple[Source, ...]:
    """All of them in one tensor; files of 2023 have one for each."""
    return (*_layer(f"ffn_{name}_exps.weight"), *_layer(f"ffn_{name}.{{expert}}.weight"))


_MOE: Names = {
    **_linear("moe/router", "ffn_gate_inp"),
    **{f"moe/{name}/weight": _experts(name) for name in ("gate", "up", "down")},
    **{f"moe/{name}/bias": _layer(f"ffn_{name}_exps.bias") for name in ("gate", "up", "down")},
}


def dense(model: ModelConfig) -> Names:
    """Qwen's, with experts or without."""
    return {**_DENSE, **_MOE}


def llama(model: ModelConfig) -> Names:
    """Llama's, Mistral's and Mixtral's: rows of q and k in llama.cpp's order."""
    ordered = Plain(head_dim=model.head_dim)
    return {**dense(model), **_linear("attention/q", "attn_q", ordered), **_linear("attention/k", "attn_k", ordered)}


def gemma(model: ModelConfig) -> Names:
    """Gemma's: four norms in a layer, all of them stored with the one that they are added to."""
    less_one = Plain(less_one=True)
    norms = _norms(
        less_one, attention_norm="attn_norm", attention_post_norm="post_attention_norm",
        mlp_norm="ffn_norm", mlp_post_norm="post_ffw_norm",
    )  # fmt: skip
    heads = {f"attention/{name}_norm/scale": _layer(f"attn_{name}_norm.weight", less_one) for name in "qk"}
    return {**_DENSE, **norms, **heads, "final_norm/scale": _tensor("output_norm.weight", less_one)}


def phi3(model: ModelConfig) -> Names:
    """Phi-3's: the rows of q, k and v in one tensor, those of gate and up in another."""
    attention, mlp_dim = model.layers[0].attention, model.layers[0].mlp.mlp_dim
    q_end = attention.num_heads * attention.head_dim
    k_end = q_end + attention.num_kv_heads * attention.head_dim
    qkv, gate_up = _LAYER + "attn_qkv.weight", _LAYER + "ffn_up.weight"

    def rows(name: str, start: int | None, stop: int | None) -> Source:
        return Source(names=(name,), packing=_PLAIN, rows=slice(start, stop))

    return {
        **_DENSE,
        "attention/q/weight": (rows(qkv, None, q_end), *_layer("attn_q.weight")),
        "attention/k/weight": (rows(qkv, q_end, k_end), *_layer("attn_k.weight")),
        "attention/v/weight": (rows(qkv, k_end, None), *_layer("attn_v.weight")),
        "mlp/gate/weight": (rows(gate_up, None, mlp_dim),),
        "mlp/up/weight": (rows(gate_up, mlp_dim, None),),
    }


def gpt_oss(model: ModelConfig) -> Names:
    """gpt-oss's: sinks, and biases everywhere."""
    norm = _norms(_PLAIN, mlp_norm="post_attention_norm")
    return {**_DENSE, **_MOE, **norm, "attention/sinks": _layer("attn_sinks.weight")}
