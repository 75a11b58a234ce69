"""compressed-tensors: one or more groups of linear layers, each in a scheme of its own, as llm-compressor publishes it.

Where activations are quantized with static scales, or asymmetrically, each token gets a scale of its own here, which
is at least as exact; 4-bit weights take activations as they are.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import UnsupportedModelError
from ....pallas_kernels.quantized_matmul.contract import FORMATS, ActivationDtype, WeightFormat
from ..reader import ConfigReader
from ..source import ALL, Source
from .fp8 import STATIC_REMARK, row_scales
from .packing import Divisor, PackedInputs, Powers, Scales, ZeroPoints
from .scheme import Projection, Scheme, beside, block_rows
from .shared import CACHE_SCALES, packed_integers, read_cache_remark, read_module_list

DEFAULTS: Mapping[str, Any] = {"ignore": []}
_GROUP: Mapping[str, Any] = {"targets": ["Linear"]}
_ARGS: Mapping[str, Any] = {"dynamic": False, "num_bits": 8, "symmetric": True, "type": "int"}
# How scales were found, and the dtypes of tensors, which are seen from the tensors.
_HARMLESS_ARGS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_IGNORED = (r".*\.(weight_shape|(input|output)_(scale|zero_point|global_scale))$", CACHE_SCALES)
_MAX_PATTERN_LEN, _MAX_QUANTIFIERS, _NAME_LEN = 4096, 4, 100

_AS_THEY_ARE = ("float-quantized", "int-quantized", "naive-quantized")
_NAMES = {("float", 8): "fp8", ("int", 8): "int8"}
_PACKED = ((("int", 4), True), (("int", 4), False), (("int", 8), True))
_FP4: Mapping[Any, str] = {
    (("float", 4), "nvfp4-pack-quantized", 16): "nvfp4",
    (("float", 4), "mxfp4-pack-quantized", 32): "mxfp4",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Selection:
    """What an `ignore` or `targets` names: modules, "re:" and a pattern for their beginning, or all linear layers."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def closeness(self, module: str) -> int:
        """How closely it names a module: 3 by its name, 2 by a pattern, 1 with all linear layers, 0 not at all."""
        if module in self.names:
            return 3
        return 2 if any(pattern.match(module) for pattern in self.patterns) else int("Linear" in self.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """Linear layers of one scheme."""

    targets: _Selection
    format: WeightFormat
    remark: str | None


def read(section: ConfigReader, dtype: str) -> Scheme:
    """The format of the group that names a layer most closely, the first of several; none if the layer is ignored."""
    section.ignore("global_compression_ratio", "version")
    section.expect("quantization_status", "compressed", "frozen")
    section.expect("transform_config", {}, {"config_groups": {}})
    if section.get("sparsity_config"):
        sparsity = section.section("sparsity_config", {})
        sparsity.expect("format", "dense")
        sparsity.ignore("global_sparsity", "ignore", "registry_requires_subclass", "sparsity_structure", "targets")
    names = section.section("config_groups", {})
    groups = [_read_group(names.section(name, _GROUP), _read_layout(section), dtype) for name in _keys(section)]
    ignored = _read_selection(section, "ignore")
    remarks = [group.remark for group in groups] + [read_cache_remark(section)]

    def format_of(modules: Sequence[str]) -> WeightFormat | None:
        if any(map(ignored.closeness, modules)):
            return None
        found = [max(map(group.targets.closeness, modules), default=0) for group in groups]
        return groups[found.index(max(found))].format if any(found) else None

    return Scheme(
        method="compressed-tensors",
        format_of=format_of,
        spellings=_spellings,
        ignored_tensors=_IGNORED,
        remark="; ".join(dict.fromkeys(filter(None, remarks))) or None,
    )


def _keys(section: ConfigReader) -> list[str]:
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise section.wrong("config_groups", "an object of at least one group")
    return list(groups)


def _read_layout(section: ConfigReader) -> str | None:
    layout = section.get("format")
    if not isinstance(layout, str | None):
        raise section.wrong("format", "the name of a layout")
    return layout


def _read_group(group: ConfigReader, layout: str | None, dtype: str) -> _Group:
    group.expect("output_activations")
    layout = _read_layout(group) or layout
    weights = group.section("weights", _ARGS)
    weights.ignore(*_HARMLESS_ARGS)
    weights.expect("dynamic", False)
    weights.expect("actorder", False, "weight", "static")
    activations, remark = _read_activations(group)
    format = _read_weights(weights, layout, dtype, activations)
    if activations != "own" and format.activations == "own":
        remark = "its activations are to be quantized, but stay as they are beside 4-bit weights and grouped ones"
    return _Group(targets=_read_selection(group, "targets"), format=format, remark=remark)


def _read_activations(group: ConfigReader) -> tuple[ActivationDtype, str | None]:
    if group.get("input_activations") is None:
        return "own", None
    args = group.section("input_activations", _ARGS)
    args.ignore(*_HARMLESS_ARGS, "actorder", "block_structure", "group_size", "strategy")
    dtype: ActivationDtype = args.choice("type", {"int": "int8", "float": "float8_e4m3fn"})
    is_dynamic, symmetric = args.get("dynamic"), args.flag("symmetric")
    if args.integer("num_bits") == 4:
        return dtype, None  # _read_group says what becomes of it
    args.expect("num_bits", 8)
    if not symmetric:
        return dtype, "its activations have zero points, which are not used: each token gets a scale of its own"
    return dtype, None if is_dynamic else STATIC_REMARK


def _read_weights(args: ConfigReader, layout: str | None, dtype: str, activations: ActivationDtype) -> WeightFormat:
    format = _weight_format(args, layout, dtype, activations)
    if format is None:
        keys = ("type", "num_bits", "symmetric", "strategy", "group_size", "block_structure")
        came = ", ".join(f"{key!r} {args.get(key)!r}" for key in keys)
        raise UnsupportedModelError(
            f"{args.where}: expected fp8 with scales of a tensor, channel or block, int8 with scales of a tensor or "
            "channel, packed integers of 4 bits or 8, nvfp4 or mxfp4, all but those of 4 bits symmetric; got "
            f"{came} in 'format' {layout!r}"
        )
    return format


def _weight_format(
    args: ConfigReader, layout: str | None, dtype: str, activations: ActivationDtype
) -> WeightFormat | None:
    """None where it is none of those that are implemented."""
    kind = (args.choice("type", {"int": "int", "float": "float"}), args.integer("num_bits"))
    strategy, symmetric = args.get("strategy"), args.flag("symmetric")
    group = args.integer("group_size") if strategy in ("group", "tensor_group") else None
    by_row, suffix = strategy in ("tensor", "channel"), "_a16" if activations == "own" else ""
    if layout == "pack-quantized" and (by_row or group) and (kind, symmetric) in _PACKED:
        return packed_integers(kind[1], group, dtype, zeros=not symmetric)
    if not symmetric:
        return None
    if layout in _AS_THEY_ARE and by_row and kind in _NAMES:
        return FORMATS[_NAMES[kind] + suffix]
    if layout in _AS_THEY_ARE and strategy == "block" and kind == ("float", 8):
        rows, columns = _read_block(args)
        return dataclasses.replace(FORMATS["fp8_block"], block_rows=rows, group=columns, activations=activations)
    return FORMATS.get(_FP4.get((kind, layout, group), ""))


def _read_block(args: ConfigReader) -> tuple[int, int]:
    block = args.get("block_structure")
    sizes = [int(part) for part in re.findall(r"\d+", block)] if isinstance(block, str) else block
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(each) is int and each > 0 for each in sizes):
        raise args.wrong("block_structure", "two whole numbers above 0")
    return sizes[0], sizes[1]


def _spellings(projection: Projection, plain: Source) -> Mapping[str, tuple[Source, ...]]:
    """Values as they are stand in `weight`, packed ones in `weight_packed`."""
    format = projection.format
    if format.storage == "float4_e2m1":
        powers = Powers() if format.scale == "float8_e8m0fnu" else None
        return {
            "weight": (beside(plain, ".weight_packed"),),
            "scales": (beside(plain, ".weight_scale", packing=powers),),
            "global_scale": (beside(plain, ".weight_global_scale", packing=Divisor(), rows=ALL),),
        }
    packed = beside(plain, ".weight_packed", packing=PackedInputs(bits=4 if format.is_packed else 8))
    by_group = beside(
        plain, ".weight_scale", packing=Scales(dtype=format.scale), rows=block_rows(plain, format.block_rows)
    )
    return {
        "weight": (packed,) if format.is_packed else (plain, packed),
        "scales": (row_scales(projection, plain) if format.group is None else by_group,),
        "zeros": (beside(plain, ".weight_zero_point", packing=ZeroPoints(words_first=True)),),
    }


def _read_selection(section: ConfigReader, key: str) -> _Selection:
    entries = read_module_list(section, key)
    patterns = (_pattern(section, key, entry.removeprefix("re:")) for entry in entries if entry.startswith("re:"))
    return _Selection(names=frozenset(entries), patterns=tuple(patterns))


def _pattern(section: ConfigReader, key: str, text: str) -> re.Pattern[str]:
    """A pattern that takes no longer than its length lets expect: a checkpoint may come from anybody."""
    quantifiers = len(re.findall(r"(?<!\\)[*+{]|(?<![\\(*+?}])\?", text))
    tries = (text.count("|") + 1) ** text.count("(") * _NAME_LEN**quantifiers  # at the worst
    is_slow = tries > _NAME_LEN**_MAX_QUANTIFIERS or re.search(r"\)[*+{]", text)
    if len(text) > _MAX_PATTERN_LEN or is_slow:
        raise section.wrong(
            key,
            f"names, or patterns of at most {_MAX_PATTERN_LEN:,} characters, {_MAX_QUANTIFIERS} repetitions, fewer "
            f"with many choices, and no repeated group (unlike {text!r:.60})",
        )
    try:
        return re.compile(text)
    except re.error as error:
        raise section.wrong(key, f"names and patterns (unlike {text!r:.60}: {error})") from error
