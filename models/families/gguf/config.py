"""A GGUF's metadata as the config.json that its model would have, one reader for each architecture.

As strict as the families: a key of the architecture that is not read, and is not known to change nothing, is refused.
Sources: llama.cpp's convert_hf_to_gguf.py, which writes the keys, and llama-model.cpp, which knows what is not written.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ....errors import UnsupportedModelError
from ..reader import ConfigReader
from .packing import Plain

type ReadTensor = Callable[[str], np.ndarray]

# What they say is said by shapes, or changes nothing of what is computed.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.causal")
_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
IGNORED_TENSORS = (r"rope_(freqs|factors_long|factors_short)\.weight$", r"blk\.\d+\.attn_rot_embd\.weight$")


class Metadata:
    """What a file says of its model: keys of its architecture, its tensors' shapes, and the few that are read here."""

    def __init__(
        self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: ReadTensor, where: str
    ) -> None:
        self.shapes, self._read = shapes, read
        architecture = values.get("general.architecture")
        prefix = f"{architecture}."
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        self.reader = ConfigReader(own, {}, where=f"{where}: the metadata of {architecture!r}")
        self.reader.ignore(*_HARMLESS)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.shapes

    def factors(self, name: str, count: int) -> list[float]:
        """The factors of a rope's wavelengths, [count]."""
        if not self.has(name):
            raise UnsupportedModelError(f"{self.reader.where}: expected a tensor {name} beside the other factors")
        values = Plain().build([self._read(name)]).astype(np.float64).reshape(-1)
        if values.size != count or not (np.isfinite(values) & (values > 0)).all():
            raise UnsupportedModelError(
                f"{self.reader.where}: {name} should hold {count} numbers above 0, for half of a head's rotated "
                f"dimensions; it holds {values.size}"
            )
        return [float(value) for value in values]


def _shared(metadata: Metadata) -> dict[str, Any]:
    """What every architecture has."""
    reader = metadata.reader
    heads, embed_dim = _same(reader, "attention.head_count"), reader.integer("embedding_length")
    kv_heads = _same(reader, "attention.head_count_kv", heads)
    head_dim = reader.optional_integer("attention.key_length")
    if head_dim is None and embed_dim % heads:
        raise reader.wrong(
            "embedding_length", f"a multiple of {heads} heads, where 'attention.key_length' is not given"
        )
    head_dim = head_dim or embed_dim // heads
    reader.expect("attention.value_length", head_dim)
    embedding = metadata.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise UnsupportedModelError(f"{reader.where}: expected a tensor token_embd.weight [vocabulary, width]")
    return {
        "hidden_size": embed_dim,
        "intermediate_size": _same(reader, "feed_forward_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": reader.integer("context_length"),
        "vocab_size": embedding[0],
        "tie_word_embeddings": not metadata.has("output.weight"),
    }


def _same(reader: ConfigReader, key: str, default: int | None = None) -> int:
    """A number that may be given layer by layer, if all are equal."""
    value = reader.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, list) and value and all(each == value[0] for each in value) and type(value[0]) is int:
        if value[0] > 0:
            return int(value[0])
    return reader.integer(key)


def _rope(metadata: Metadata, head_dim: int, context_len: int, *, truncate: bool = True) -> dict[str, Any]:
    """rope_theta, and rope_scaling where there is one; `head_dim` is its rotated part."""
    reader = metadata.reader
    theta = {"rope_theta": reader.optional_number("rope.freq_base", above=1) or 10_000.0}
    kind = reader.get("rope.scaling.type") or "none"
    factor = reader.optional_number("rope.scaling.factor") or reader.optional_number("rope.scale_linear")
    original = reader.optional_integer("rope.scaling.original_context_length")
    betas = {key: reader.optional_number(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    if (tables := _tables(metadata, head_dim // 2, context_len)) is not None:
        return {**theta, "rope_scaling": tables}
    if kind == "yarn":
        magnitude = reader.optional_number("rope.scaling.attn_factor")
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or context_len}
        scaling |= {key: value for key, value in betas.items() if value is not None}
        if magnitude not in (None, 1.0) and factor:
            scaling["attention_factor"] = magnitude * (0.1 * math.log(factor) + 1)
        return {**theta, "rope_scaling": {**scaling, "truncate": truncate}}
    reader.expect("rope.scaling.attn_factor", 1.0)
    if kind == "linear" or (kind == "none" and factor not in (None, 1.0)):
        return {**theta, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "none":
        raise reader.wrong("rope.scaling.type", "none, linear, yarn, or longrope beside its two tensors of factors")
    return theta


def _tables(metadata: Metadata, count: int, context_len: int) -> dict[str, Any] | None:
    """A scaling that is said by tensors of `count` factors: longrope's two, or llama3's one, which is both of them."""
    reader = metadata.reader
    if metadata.has(_FREQUENCIES):
        short = long = metadata.factors(_FREQUENCIES, count)
        original = context_len
    elif metadata.has(_LONG) or metadata.has(_SHORT):
        short, long = (metadata.factors(name, count) for name in (_SHORT, _LONG))
        original = reader.integer("rope.scaling.original_context_length")
    else:
        return None
    reader.expect("rope.scaling.type", "none", "longrope")
    for key in ("rope.scaling.factor", "rope.scale_linear"):  # llama.cpp would multiply by both
        reader.expect(key, 1.0)
    magnitude = reader.optional_number("rope.scaling.attn_factor") or 1.0
    factors = {"short_factor": short, "long_factor": long, "attention_factor": magnitude}
    return {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": original, **factors}


def _whole_rope(metadata: Metadata, config: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The rope of whole heads."""
    metadata.reader.expect("rope.dimension_count", config["head_dim"])
    return _rope(metadata, config["head_dim"], config["max_position_embeddings"], **options)


def _experts(metadata: Metadata, count_key: str) -> dict[str, Any]:
    reader = metadata.reader
    return {count_key: reader.integer("expert_count"), "num_experts_per_tok": reader.integer("expert_used_count")}


def llama(metadata: Metadata) -> dict[str, Any]:
    """Llama; with experts Mixtral; with a window Mistral."""
    config = _shared(metadata)
    config |= _whole_rope(metadata, config)
    window = metadata.reader.optional_integer("attention.sliding_window")
    if metadata.reader.optional_integer("expert_count", minimum=0):
        return {**config, **_experts(metadata, "num_local_experts"), "model_type": "mixtral", "sliding_window": window}
    metadata.reader.ignore("expert_count", "expert_used_count")
    if window is not None:
        return {**config, "model_type": "mistral", "sliding_window": window}
    biases = {
        "attention_bias": metadata.has("blk.0.attn_q.bias"),
        "mlp_bias": metadata.has("blk.0.ffn_gate.bias"),
    }
    return {**config, **biases, "model_type": "llama"}


def qwen2(metadata: Metadata) -> dict[str, Any]:
    """Qwen2 and Qwen2.5."""
    config = _shared(metadata)
    return {**config, **_whole_rope(metadata, config), "model_type": "qwen2"}


def qwen3(metadata: Metadata) -> dict[str, Any]:
    """Qwen3."""
    config = _shared(metadata)
    biases = {"attention_bias": metadata.has("blk.0.attn_q.bias")}
    return {**config, **_whole_rope(metadata, config), **biases, "model_type": "qwen3"}


def qwen3_moe(metadata: Metadata) -> dict[str, Any]:
    """Qwen3-MoE, the weights of whose picked experts sum to one."""
    config = qwen3(metadata) | _experts(metadata, "num_experts")
    inner = metadata.reader.integer("expert_feed_forward_length")
    return {**config, "model_type": "qwen3_moe", "moe_intermediate_size": inner, "norm_topk_prob": True}


def gemma2(metadata: Metadata) -> dict[str, Any]:
    """Gemma 2. Queries are scaled by the head's size, but in the model of 27B, which is known by its layers."""
    config, reader = _shared(metadata), metadata.reader
    return {
        **config,
        **_whole_rope(metadata, config),
        "model_type": "gemma2",
        "query_pre_attn_scalar": _gemma_scalar(config, 46),
        "sliding_window": reader.optional_integer("attention.sliding_window") or 4096,
        "attn_logit_softcapping": reader.optional_number("attn_logit_softcapping") or 50.0,
        "final_logit_softcapping": reader.optional_number("final_logit_softcapping") or 30.0,
    }


def _gemma_scalar(config: Mapping[str, Any], layers_of_27b: int) -> float:
    if config["num_hidden_layers"] == layers_of_27b:
        return float(config["hidden_size"]) / float(config["num_attention_heads"])
    return float(config["head_dim"])


def gemma3(metadata: Metadata) -> dict[str, Any]:
    """Gemma 3, text: five local layers, whose rope is not scaled, to each global one."""
    config, reader = _shared(metadata), metadata.reader
    return {
        **config,
        **_whole_rope(metadata, config),
        "model_type": "gemma3_text",
        "rope_local_base_freq": reader.optional_number("rope.freq_base_swa", above=1) or 10_000.0,
        "query_pre_attn_scalar": _gemma_scalar(config, 62),
        "sliding_window": reader.integer("attention.sliding_window"),
        "sliding_window_pattern": reader.optional_integer("attention.sliding_window_pattern") or 6,
        "final_logit_softcapping": reader.optional_number("final_logit_softcapping"),
    }


def phi3(metadata: Metadata) -> dict[str, Any]:
    """Phi-3 and Phi-4: a part of each head may go unrotated."""
    config, reader = _shared(metadata), metadata.reader
    head_dim = config["head_dim"]
    rotated = reader.optional_integer("rope.dimension_count") or head_dim
    config |= _rope(metadata, rotated, config["max_position_embeddings"])
    window = reader.optional_integer("attention.sliding_window", minimum=0)
    partial = {} if rotated == head_dim else {"partial_rotary_factor": rotated / head_dim}
    return {**config, **partial, "model_type": "phi3", "sliding_window": window or None}


def gpt_oss(metadata: Metadata) -> dict[str, Any]:
    """gpt-oss: every second layer, from the first on, has a window."""
    config = _shared(metadata)
    inner = metadata.reader.optional_integer("expert_feed_forward_length")
    return {
        **config,
        **_whole_rope(metadata, config, truncate=False),
        **_experts(metadata, "num_local_experts"),
        "model_type": "gpt_oss",
        "intermediate_size": inner or config["intermediate_size"],
        "sliding_window": metadata.reader.integer("attention.sliding_window"),
    }
