"""What the families' config readers have in common: sizes, windows, and the model around its layers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UnsupportedModelError
from ...pallas_kernels.gated_activation import Activation
from ..config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, MoeSpec
from .names import Names
from .reader import ConfigReader, agreed

MAX_LAYERS = 1024
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
DTYPES: Mapping[str, str] = {name: name for name in ("bfloat16", "float16", "float32")}

# What transformers takes where a family's config.json lacks the key; a family adds its own and overrides these.
DEFAULTS: Mapping[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "layer_types": None,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A config reader and a table of weight names, nothing else.

    `ignored_tensors` are regular expressions, matched from the start, of tensors that the model does not compute with.
    """

    name: str
    model_types: tuple[str, ...]
    defaults: Mapping[str, Any]
    config_from_hf: Callable[[ConfigReader], ModelConfig]
    sources: Callable[[ModelConfig], Names]
    ignored_tensors: tuple[str, ...] = ()


def read_heads(reader: ConfigReader) -> dict[str, int]:
    """AttentionSpec's num_heads, num_kv_heads and head_dim."""
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = reader.optional_integer("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise reader.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    embed_dim = reader.integer("hidden_size")
    head_dim = reader.optional_integer("head_dim")
    if head_dim is None and embed_dim % num_heads:
        raise reader.wrong(
            "hidden_size", f"a multiple of num_attention_heads, {num_heads}, where 'head_dim' is not given"
        )
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim or embed_dim // num_heads}


def read_attention(reader: ConfigReader, **fields: Any) -> AttentionSpec:
    """Grouped-query attention, scaled by 1 / sqrt(head_dim) unless `fields` says otherwise."""
    heads = read_heads(reader)
    return AttentionSpec(**{"scale": heads["head_dim"] ** -0.5, "rope": None, **heads, **fields})


def read_mlp(reader: ConfigReader, *, activation_key: str = "hidden_act", bias: bool = False) -> MlpSpec:
    """The gated MLP of every dense layer."""
    activation = reader.choice(activation_key, ACTIVATIONS)
    return MlpSpec(mlp_dim=reader.integer("intermediate_size"), activation=activation, bias=bias)


def read_moe(reader: ConfigReader, *, num_experts: int, mlp_dim: int, **fields: Any) -> MoeSpec:
    """The experts of every sparse layer."""
    picked = reader.integer("num_experts_per_tok")
    if picked > num_experts:
        raise reader.wrong("num_experts_per_tok", f"at most the number of experts, {num_experts}")
    activation = reader.choice("hidden_act", ACTIVATIONS)
    return MoeSpec(
        num_experts=num_experts, num_experts_per_token=picked, mlp_dim=mlp_dim, activation=activation, **fields
    )


def read_num_layers(reader: ConfigReader) -> int:
    """L."""
    num_layers = reader.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise reader.wrong("num_hidden_layers", f"at most {MAX_LAYERS}")
    return num_layers


def read_windows(
    reader: ConfigReader, window: int | None, slides: Callable[[int], bool]
) -> tuple[int | None, ...]:  # fmt: skip
    """Each layer's window: where `layer_types` says so, or, if that is absent, where `slides(layer)`."""
    num_layers = read_num_layers(reader)
    kinds = reader.get("layer_types")
    if kinds is None:
        return tuple(window if slides(layer) else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise reader.wrong("layer_types", f"a list of {num_layers} names, each {known[0]!r} or {known[1]!r}")
    if window is None and known[1] in kinds:
        raise reader.wrong("layer_types", "without sliding layers, because the config sets no sliding window")
    return tuple(window if kind == known[1] else None for kind in kinds)


def read_uniform_window(reader: ConfigReader) -> int | None:
    """The window of families whose layers are all alike."""
    window = reader.optional_integer("sliding_window")
    if any(each != window for each in read_windows(reader, window, lambda layer: True)):
        raise reader.wrong("layer_types", "'sliding_attention' for every layer, because 'sliding_window' is set")
    return window


def alternate(attention: AttentionSpec, windows: Sequence[int | None]) -> tuple[AttentionSpec, ...]:
    """One attention per layer, which differ in their windows."""
    return tuple(dataclasses.replace(attention, window=window) for window in windows)


def read_model(
    reader: ConfigReader, family: str, layers: Sequence[LayerSpec], *, default_dtype: str = "float32", **fields: Any
) -> ModelConfig:
    """The model around its layers; `fields` are ModelConfig's."""
    given = [key for key in ("dtype", "torch_dtype") if reader.get(key) is not None]
    dtype = agreed([(key, reader.choice(key, DTYPES)) for key in given], reader.where)
    return ModelConfig(
        **{
            "family": family,
            "vocab_size": reader.integer("vocab_size"),
            "embed_dim": reader.integer("hidden_size"),
            "layers": tuple(layers),
            "max_context_len": _max_context_len(reader, layers),
            "norm_eps": reader.number("rms_norm_eps"),
            "tie_embeddings": reader.flag("tie_word_embeddings"),
            "dtype": dtype or default_dtype,
            **fields,
        }
    )


def _max_context_len(reader: ConfigReader, layers: Sequence[LayerSpec]) -> int:
    """max_position_embeddings, or what the rope's scaling stretches it to where that key holds the original length."""
    longest = reader.integer("max_position_embeddings")
    ropes = [layer.attention.rope for layer in layers]
    if any(rope != ropes[0] for rope in ropes):
        return longest  # with several ropes (Gemma 3) the key holds the stretched length
    rope = ropes[0]
    if rope is not None and rope.kind in ("linear", "dynamic"):
        return max(longest, int(longest * rope.factor))
    if rope is not None and rope.kind == "yarn":
        return max(longest, int(rope.original_max_len * rope.factor))
    return longest


def check_cache(model: ModelConfig) -> None:
    """Raises UnsupportedModelError unless one cache array can hold the keys and values of every layer."""
    shapes = {(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in model.layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"all layers should have the same (num_kv_heads, head_dim), but there are {shapes}")
