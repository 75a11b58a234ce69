"""The formats of a GGUF's weights: in its config.json's form {"quant_method": "gguf", "formats": {...}}, and back.

    "formats": {"attention/q": "q4_k", "mlp/down": ["q6_k", "q4_k", null], "head": "q6_k"}

A name is every layer's, a list has one for each; null and absent are plain. Stores keep it as it is.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ....errors import UnsupportedModelError
from ....pallas_kernels.quantized_matmul.contract import WeightFormat
from ...config import ModelConfig
from ...quantization import HEAD, Rule, mlp_block, with_formats
from ..names import Names
from ..reader import ConfigReader
from ..source import Source
from .blocks import BLOCK_TYPES

METHOD = "gguf"
# Kinds of layers that are compiled one by one in every program. A Q4_K_M file has about five; a file that chooses types
# layer by layer may have one kind for each layer.
MAX_KINDS = 12

_SMALL = WeightFormat(name="int8_g16_offsets", storage="int8", group=16, offsets=True)
# What differing types of a projection become where there would be too many kinds: integers that all of them fit.
_COMMON = (
    dataclasses.replace(_SMALL, name="int8_g32", group=32, offsets=False),
    dataclasses.replace(_SMALL, name="int8_g16", offsets=False),
    dataclasses.replace(_SMALL, name="int8_g32_offsets", group=32),
    _SMALL,
)
FORMATS: Mapping[str, WeightFormat] = {
    format.name: format for format in (*(each.format for each in BLOCK_TYPES.values()), *_COMMON)
}

type Column = Sequence[WeightFormat | None]  # of a projection, layer by layer


def read(section: ConfigReader) -> Rule:
    """The format of each projection, from the section of a config.json."""
    formats = section.get("formats")
    if not isinstance(formats, dict):
        raise section.wrong("formats", "an object of formats by projection")
    columns = {path: _column(section, value) for path, value in formats.items()}

    def rule(layer: int | None, projection: str) -> WeightFormat | None:
        column = columns.get(projection, (None,))
        if layer is None or len(column) == 1:
            return column[0]
        if layer >= len(column):
            raise UnsupportedModelError(
                f"{section.where}: {projection!r} should have a format for each layer, but there are {len(column)}"
            )
        return column[layer]

    return rule


def _column(section: ConfigReader, value: Any) -> Column:
    names = value if isinstance(value, list) and value else [value]
    if not all(name is None or isinstance(name, str) and name in FORMATS for name in names):
        raise section.wrong("formats", f"names of formats, which are {', '.join(FORMATS)}")
    return [None if name is None else FORMATS[name] for name in names]


def section_of(model: ModelConfig, names: Names, types: Mapping[str, str]) -> dict[str, Any] | None:
    """The section for tensors of these types, by name; None if no projection is quantized."""
    paths = [f"attention/{name}" for name in "qkvo"]
    paths += [
        f"{block}/{name}" for block in {mlp_block(layer) for layer in model.layers} for name in ("gate", "up", "down")
    ]
    layers = range(model.num_layers)
    columns: dict[str, Column] = {path: [_format(path, layer, names, types) for layer in layers] for path in paths}
    if not model.tie_embeddings:
        columns[HEAD] = [_format(HEAD, 0, names, types)]
    columns = _with_few_kinds(model, columns)
    formats = {path: _spelled(column) for path, column in sorted(columns.items()) if any(column)}
    return {"quant_method": METHOD, "formats": formats} if formats else None


def _format(path: str, layer: int, names: Names, types: Mapping[str, str]) -> WeightFormat | None:
    """That of the first spelling that is there."""
    for source in names.get(f"{path}/weight", ()):
        found = {types[name] for name in _resolved(source, layer, types)}
        if len(found) > 1:
            raise UnsupportedModelError(
                f"expected every expert of layer {layer} in one type; {path} has {sorted(found)}"
            )
        if found:
            type = BLOCK_TYPES.get(found.pop())
            return None if type is None else type.format
    return None  # a tensor that is not there is the plan's to report


def _resolved(source: Source, layer: int, types: Mapping[str, str]) -> Iterator[str]:
    """A layer's tensor, or those of its experts, up to the first that is not there."""
    experts = itertools.count() if source.per_expert else range(1)
    names = (source.resolve(layer, expert)[0] for expert in experts)  # every source here has one
    return itertools.takewhile(lambda name: name in types, names)


def _with_few_kinds(model: ModelConfig, columns: dict[str, Column]) -> dict[str, Column]:
    """The same, or, where it would make too many kinds of layers, projections of several types in a common format."""

    def rule(layer: int | None, projection: str) -> WeightFormat | None:
        column = columns.get(projection, (None,))
        return column[0] if layer is None else column[layer]

    if sum(len(stage.period) for stage in with_formats(model, rule).stages) <= MAX_KINDS:
        return columns
    return {path: _in_common(column) for path, column in columns.items()}


def _in_common(column: Column) -> Column:
    """One format that holds all values of a column's, where they are integers and differ."""
    formats = {format for format in column if format is not None}
    if len(formats) < 2 or any(format.storage == "float4_e2m1" for format in formats):
        return column
    group = min(format.group or 0 for format in formats)
    offsets = any(format.offsets for format in formats)
    common = next(each for each in _COMMON if each.group == group and each.offsets == offsets)
    return [None if format is None else common for format in column]


def _spelled(column: Column) -> str | list[str | None] | None:
    names = [None if format is None else format.name for format in column]
    return names[0] if len(set(names)) == 1 else names
