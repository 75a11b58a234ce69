"""The model families: what a Hugging Face checkpoint's config.json and tensor names mean, one file each."""

import difflib
import logging
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import CheckpointError, ConfigError, UnsupportedModelError
from ..config import ModelConfig
from ..quantization import Rule, with_formats
from . import gemma2, gemma3, gpt_oss, llama, mistral, mixtral, olmo2, phi3, plan, qwen2, qwen3, qwen3_moe
from .plan import LeafPlan, Piece
from .published.scheme import Scheme
from .quantization import KEY, read_quantization
from .reader import ConfigReader
from .shared import Family, check_cache

__all__ = ["FAMILIES", "Family", "LeafPlan", "Piece", "config_from_hf", "tensor_plan"]

_MODULES = (llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, olmo2, mixtral, qwen3_moe, gpt_oss)

_logger = logging.getLogger(__name__)

# By config.json's model_type.
FAMILIES: Mapping[str, Family] = {name: module.FAMILY for module in _MODULES for name in module.FAMILY.model_types}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Raises CheckpointError if it is no JSON object, and UnsupportedModelError if the family, a value or a key of it is
    not implemented; the message names them.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json should be a JSON object, but it is a {type(config).__name__}")
    family = _family(config)
    reader = ConfigReader({key: value for key, value in config.items() if key != KEY}, family.defaults)
    model = family.config_from_hf(reader)
    reader.finish()
    check_cache(model)
    found = read_quantization(config, model.dtype)
    return model if found is None else _quantized(model, found)


def _quantized(model: ModelConfig, found: Rule | Scheme) -> ModelConfig:
    rule = found.rule(model, FAMILIES[model.family].sources(model)) if isinstance(found, Scheme) else found
    try:
        return with_formats(model, rule)
    except ConfigError as error:
        raise UnsupportedModelError(f"config.json, {KEY!r}: {error}") from error


def tensor_plan(
    model: ModelConfig, available_names: Collection[str], config: Mapping[str, Any] | None = None
) -> dict[str, LeafPlan]:
    """Parameter path -> how to build it from the tensors of a checkpoint that holds `available_names`.

    `config` is the checkpoint's config.json, which says where the parts of quantized weights lie.

    Raises CheckpointError if tensors are missing or left over.
    """
    family = FAMILIES[model.family]
    found = read_quantization(config or {}, model.dtype)
    scheme = found if isinstance(found, Scheme) else None
    if scheme is not None and scheme.remark is not None:
        _logger.warning("%s checkpoint: %s", scheme.method, scheme.remark)
    # A tied head is saved by some: it is the embedding once more.
    tied = (r"(language_model\.)?lm_head\.weight$",) if model.tie_embeddings else ()
    ignored = (*family.ignored_tensors, *tied, *(scheme.ignored_tensors if scheme else ()))
    return plan.tensor_plan(model, family.sources(model), available_names, ignored, scheme)


def _family(config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, n=1)
    code = " (its 'auto_map' names code, and code of a checkpoint is never run)" if config.get("auto_map") else ""
    raise UnsupportedModelError(
        f"config.json: 'model_type' should be one of {', '.join(FAMILIES)}, but it is {name!r}{code}"
        + (f"; is it a {near[0]}?" if near else "")
    )
