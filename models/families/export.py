"""The way back: which tensors a published checkpoint of a family holds, which parameters fill them, and its config."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import ModelConfig, MoeSpec
from . import FAMILIES
from .gemma3 import SIZES_OF_OTHER_PARTS
from .names import Names
from .plan import tensor_plan
from .source import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPart:
    """What lies at `index` of a parameter's leading axes, and how `source` would read it from the tensor."""

    path: str
    index: tuple[int, ...]
    source: Source

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """The view of the tensor that this part fills, laid out as the parameter is."""
        return self.source.build([tensor])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportTensor:
    """A tensor of a checkpoint and the parts that fill it, each element once."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[ExportPart, ...]


def export_plan(model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> tuple[ExportTensor, ...]:
    """Every tensor of the model's checkpoint, layer by layer; `shapes` are those of the parameters by path.

    Quantized weights become plain ones, of which `shapes` are. A parameter gets the first of its spellings. A tied
    head is not written.
    """
    names = _published(model)
    available = frozenset(_all_names(model, names))
    parts: dict[str, list[ExportPart]] = {}
    # Names of layers or experts that the model has not are left over: all may be ignored, there is no checkpoint yet.
    for path, leaf in tensor_plan(model, names, available, ignored=("",), as_plain=True).items():
        for piece in leaf.pieces:
            part = ExportPart(path=path, index=piece.index, source=piece.source)
            parts.setdefault(piece.names[0], []).append(part)
    ordered = sorted(parts, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(6), name))
    return tuple(
        ExportTensor(name=name, shape=_tensor_shape(parts[name], shapes), parts=tuple(parts[name])) for name in ordered
    )


def _published(model: ModelConfig) -> Names:
    """One spelling of each parameter."""
    return {path: spellings[:1] for path, spellings in FAMILIES[model.family].sources(model).items()}


def _all_names(model: ModelConfig, names: Names) -> Iterator[str]:
    """Every name that the table could mean for any layer and expert."""
    num_experts = max((layer.mlp.num_experts for layer in model.layers if isinstance(layer.mlp, MoeSpec)), default=1)
    for source in (source for spellings in names.values() for source in spellings):
        for layer in range(model.num_layers):
            for expert in range(num_experts if source.per_expert else 1):
                yield from source.resolve(layer, expert)


def _tensor_shape(parts: Sequence[ExportPart], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The parts side by side along their axis of rows, and transposed back."""
    source = parts[0].source
    laid_out = [shapes[part.path][len(part.index) :] for part in parts]
    shape = list(laid_out[0])
    shape[source.axis] = sum(each[source.axis] for each in laid_out)
    if source.transpose:
        shape[-2:] = reversed(shape[-2:])
    return tuple(shape)


def export_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of plain weights in `dtype`, for the config.json that the model was read by.

    A multimodal model becomes its text part, which is all that was read of it, and code of a checkpoint is not named:
    it is not kept.
    """
    exported = _text_part(config)
    for key in ("quantization_config", "auto_map"):
        exported.pop(key, None)
    given = [key for key in ("dtype", "torch_dtype") if key in exported]
    return exported | dict.fromkeys(given or ["dtype"], dtype)


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's text model as a model of its own; every other config as it is."""
    text = config.get("text_config")
    if text is None:
        return dict(config)
    shared = {key: value for key, value in config.items() if key not in (*SIZES_OF_OTHER_PARTS, "text_config")}
    return {**shared, **text, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
