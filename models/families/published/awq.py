"""AWQ: 4 bits with a zero point for each group of inputs, as AutoAWQ publishes it (version "gemm")."""

from collections.abc import Mapping, Sequence

from ....pallas_kernels.quantized_matmul.contract import WeightFormat
from ..reader import ConfigReader
from ..source import Source
from .packing import PackedOutputs, Scales, ZeroPoints
from .scheme import Modules, Projection, Scheme, beside
from .shared import read_bits, read_group, read_module_list

DEFAULTS = {"group_size": 128, "version": "gemm", "zero_point": True}
# Where a word of 32 bits holds each of eight neighbouring outputs.
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
# How the weights were found, and how other front ends run them.
HARMLESS = ("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "meta", "modules_to_fuse", "sym")


def read(section: ConfigReader, dtype: str) -> Scheme:
    """One format for all linear layers but the head and those of modules_to_not_convert; scales are float16."""
    read_bits(section, 4)
    section.expect("version", "gemm", "GEMM")
    for key in ("checkpoint_format", "format"):
        section.expect(key, "gemm")
    section.expect("zero_point", True)
    section.expect("pack_dtype", "int32")
    section.expect("desc_act", False)
    section.expect("dynamic", {}, False)  # formats of single modules
    section.expect("lm_head", False)
    section.ignore(*HARMLESS)
    format = WeightFormat(name="int4", storage="uint4", group=read_group(section), scale="float16", zeros=True)
    plain = Modules(frozenset(("lm_head", *read_module_list(section, "modules_to_not_convert"))))

    def format_of(modules: Sequence[str]) -> WeightFormat | None:
        return None if any(module in plain for module in modules) else format

    return Scheme(method="awq", format_of=format_of, spellings=_spellings)


def _spellings(projection: Projection, plain: Source) -> Mapping[str, tuple[Source, ...]]:
    scales = Scales(dtype=projection.format.scale, groups_first=True)
    return {
        "weight": (beside(plain, ".qweight", packing=PackedOutputs(order=NIBBLES)),),
        "scales": (beside(plain, ".scales", packing=scales),),
        "zeros": (beside(plain, ".qzeros", packing=ZeroPoints(order=NIBBLES)),),
    }
