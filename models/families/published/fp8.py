"""fp8 (e4m3) with a scale for each block of a weight, as DeepSeek and Qwen publish it, or for all of it.

Activations are quantized as they come, for each token and group of inputs or each token: what "static" scales would do
for all tokens at once, and better.
"""

from collections.abc import Mapping, Sequence

from ....pallas_kernels.quantized_matmul.contract import WeightFormat
from ..reader import ConfigReader
from ..source import ALL, Source
from .packing import RowScales, Scales
from .scheme import Modules, Projection, Scheme, beside, block_rows
from .shared import CACHE_SCALES, read_cache_remark, read_module_list

DEFAULTS = {"activation_scheme": "dynamic", "fmt": "e4m3"}
STATIC_REMARK = "its activations have static scales (input_scale), which are not used: each token gets its own"


def read(section: ConfigReader, dtype: str) -> Scheme:
    """One format for all linear layers but the head and those that are listed."""
    section.expect("fmt", "e4m3")
    section.expect("scale_fmt")
    section.ignore("dequantize")  # what transformers does with the checkpoint
    is_static = section.choice("activation_scheme", {"dynamic": False, "static": True})
    remarks = (STATIC_REMARK if is_static else None, read_cache_remark(section))
    format = _read_format(section)
    lists = (read_module_list(section, key) for key in ("modules_to_not_convert", "ignored_layers"))
    plain = Modules(frozenset(("lm_head", *(name for names in lists for name in names))))

    def format_of(modules: Sequence[str]) -> WeightFormat | None:
        return None if any(module in plain for module in modules) else format

    return Scheme(
        method="fp8",
        format_of=format_of,
        spellings=spellings,
        ignored_tensors=(r".*\.input_scale$", CACHE_SCALES),
        remark="; ".join(filter(None, remarks)) or None,
    )


def _read_format(section: ConfigReader) -> WeightFormat:
    size = section.get("weight_block_size")
    if size is None:
        return WeightFormat(name="fp8", storage="float8_e4m3fn", activations="float8_e4m3fn")
    if not (isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)):
        raise section.wrong("weight_block_size", "two whole numbers above 0")
    return WeightFormat(
        name="fp8_block", storage="float8_e4m3fn", activations="float8_e4m3fn", block_rows=size[0], group=size[1]
    )


def spellings(projection: Projection, plain: Source) -> Mapping[str, tuple[Source, ...]]:
    """`weight_scale_inv` is what the values are to be multiplied by, its name notwithstanding."""
    if projection.format.group is None:
        return {"weight": (plain,), "scales": (row_scales(projection, plain),)}
    rows = block_rows(plain, projection.format.block_rows)
    suffixes = (".weight_scale_inv", ".weight_scale")
    scales = (beside(plain, suffix, packing=Scales(dtype="float32"), rows=rows) for suffix in suffixes)
    return {"weight": (plain,), "scales": tuple(scales)}


def row_scales(projection: Projection, plain: Source) -> Source:
    """Scales of rows, or of the whole weight."""
    packing = RowScales(num_rows=projection.out_dim, rows=plain.rows)
    return beside(plain, ".weight_scale", packing=packing, rows=ALL)
