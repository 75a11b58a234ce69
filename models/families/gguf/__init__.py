"""GGUF files of llama.cpp: what their metadata, tensor names and types mean, in the terms of the families."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ....errors import UnsupportedModelError
from ...config import ModelConfig
from .. import plan
from ..names import Names
from ..plan import LeafPlan
from ..published.scheme import Projection, Scheme, parts
from ..source import Source
from . import config, names
from .blocks import BLOCK_TYPES
from .config import IGNORED_TENSORS, Metadata
from .formats import METHOD, section_of
from .packing import Plain, Quantized

__all__ = [
    "ARCHITECTURES",
    "BLOCK_TYPES",
    "Architecture",
    "Metadata",
    "architecture_of",
    "gguf_plan",
    "section_of",
]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's: a reader of its metadata and a table of its names."""

    config: Callable[[Metadata], dict[str, Any]]
    sources: Callable[[ModelConfig], Names]


# By general.architecture.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(config.llama, names.llama),
    "qwen2": Architecture(config.qwen2, names.dense),
    "qwen3": Architecture(config.qwen3, names.dense),
    "qwen3moe": Architecture(config.qwen3_moe, names.dense),
    "gemma2": Architecture(config.gemma2, names.gemma),
    "gemma3": Architecture(config.gemma3, names.gemma),
    "phi3": Architecture(config.phi3, names.phi3),
    "gpt-oss": Architecture(config.gpt_oss, names.gpt_oss),
}


def architecture_of(values: Mapping[str, Any], where: str) -> Architecture:
    """That of a file's metadata.

    Raises:
      UnsupportedModelError: it is not implemented, or not named.
    """
    name = values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: 'general.architecture' should be one of {', '.join(ARCHITECTURES)}, but it is {name!r:.80}"
        )
    return ARCHITECTURES[name]


def gguf_plan(architecture: Architecture, model: ModelConfig, available: Collection[str]) -> dict[str, LeafPlan]:
    """Parameter path -> how to build it from the file's tensors.

    Raises:
      CheckpointError: tensors are missing or left over.
    """
    scheme = Scheme(method=METHOD, format_of=lambda modules: None, spellings=_spellings)
    return plan.tensor_plan(model, architecture.sources(model), available, IGNORED_TENSORS, scheme)


def _spellings(projection: Projection, plain: Source) -> Mapping[str, tuple[Source, ...]]:
    """All parts of a quantized weight lie in the blocks of its one tensor."""
    assert isinstance(plain.packing, Plain)  # of every name in the tables
    head_dim = plain.packing.head_dim

    def part(leaf: Any) -> tuple[Source, ...]:
        packing = Quantized(leaf=leaf, format=projection.format, head_dim=head_dim)
        return (dataclasses.replace(plain, packing=packing),)

    return {leaf: part(leaf) for leaf in parts(projection.format)}
