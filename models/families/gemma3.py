"""Gemma 3, the text model: five local layers to each global one, and a rope for either kind."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import LayerSpec, ModelConfig, RopeSpec
from .gemma2 import GEMMA_DEFAULTS, read_gemma_attention, read_gemma_model
from .names import ATTENTION, MLP, SANDWICH_NORMS, TOP, with_prefixes
from .reader import ConfigReader, agreed
from .rope import SECTION_DEFAULTS, rope_from_section, rope_section
from .shared import Family, alternate, read_attention, read_heads, read_mlp, read_windows

# A published multimodal config holds only what differs from transformers' defaults: sizes have one here too.
TEXT_DEFAULTS: Mapping[str, Any] = {
    **GEMMA_DEFAULTS,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "vocab_size": 262_208,
}
SIZES_OF_OTHER_PARTS = (
    "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "image_token_id", "image_token_index",
    "mm_tokens_per_image", "vision_config",
)  # fmt: skip


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """A text config, or a multimodal one, of which the text part is served."""
    if reader.get("text_config") is None:
        return _text_config(reader)
    reader.ignore(*SIZES_OF_OTHER_PARTS)
    inherited = {key: reader.get(key) for key in ("dtype", "torch_dtype", "tie_word_embeddings")}
    text = reader.section("text_config", {**TEXT_DEFAULTS, **{k: v for k, v in inherited.items() if v is not None}})
    text.expect("model_type", "gemma3_text")
    text.expect("tie_word_embeddings", inherited["tie_word_embeddings"])  # the outer one decides
    return _text_config(text)


def _text_config(reader: ConfigReader) -> ModelConfig:
    local, whole = _read_ropes(reader, read_heads(reader)["head_dim"])
    reader.expect("attn_logit_softcapping")  # transformers reads it nowhere in Gemma 3: null is all that is known
    attention = read_attention(reader, qk_norm="head", **read_gemma_attention(reader))
    mlp = read_mlp(reader, activation_key="hidden_activation")
    layers = [
        LayerSpec(
            attention=dataclasses.replace(each, rope=whole if each.window is None else local), mlp=mlp, norms="sandwich"
        )
        for each in alternate(attention, _read_windows(reader))
    ]
    return read_gemma_model(reader, "gemma3", layers)


def _read_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    keys = ("sliding_window_pattern", "_sliding_window_pattern")
    pattern = agreed([(key, reader.optional_integer(key)) for key in keys], reader.where) or 6
    return read_windows(reader, reader.integer("sliding_window"), lambda layer: (layer + 1) % pattern != 0)


def _read_ropes(reader: ConfigReader, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """The ropes of local and of global layers; the older spelling scales the global one only."""
    nested = reader.get("rope_parameters") is not None
    if nested:
        reader.expect("rope_scaling")
        parameters = reader.section("rope_parameters", {"sliding_attention": {}, "full_attention": {}})
        local, whole = (parameters.section(key, SECTION_DEFAULTS) for key in ("sliding_attention", "full_attention"))
    else:
        local, whole = ConfigReader({}, SECTION_DEFAULTS), rope_section(reader)
    return (
        rope_from_section(reader, local, head_dim, theta=10_000.0, theta_key="rope_local_base_freq"),
        rope_from_section(reader, whole, head_dim, theta=1_000_000.0),
    )


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3", "gemma3_text"),
    defaults=TEXT_DEFAULTS,
    config_from_hf=config_from_hf,
    sources=lambda model: with_prefixes(
        {**TOP, **ATTENTION, **MLP, **SANDWICH_NORMS},
        [
            {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
            {"model.": "model.language_model."},
        ],
    ),
    ignored_tensors=(r"(model\.)?(vision_tower|multi_modal_projector)\.",),
)
