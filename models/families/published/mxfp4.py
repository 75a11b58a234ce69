"""gpt-oss's experts in 4-bit floats with a power of two for each 32 inputs (OCP Microscaling Formats 1.0)."""

from collections.abc import Mapping, Sequence

from ....pallas_kernels.quantized_matmul.contract import FORMATS, WeightFormat
from ..reader import ConfigReader
from ..source import Source
from .packing import Blocks, Powers
from .scheme import Modules, Projection, Scheme
from .shared import read_module_list

DEFAULTS: dict[str, object] = {}
EXPERTS = Modules(frozenset({"mlp.experts"}))


def read(section: ConfigReader, dtype: str) -> Scheme:
    """The experts of every layer but those of modules_to_not_convert."""
    section.ignore("dequantize")  # what transformers does with the checkpoint
    plain = Modules(frozenset(read_module_list(section, "modules_to_not_convert")))

    def format_of(modules: Sequence[str]) -> WeightFormat | None:
        if any(module in plain for module in modules) or not any(module in EXPERTS for module in modules):
            return None
        return FORMATS["mxfp4"]

    return Scheme(method="mxfp4", format_of=format_of, spellings=_spellings, suffix="")


def _spellings(projection: Projection, plain: Source) -> Mapping[str, tuple[Source, ...]]:
    """Beside the plain tensor [experts, in, out] stand `_blocks` and `_scales`, which are [experts, out, ...]."""
    (name,) = plain.names
    return {
        "weight": (Source(names=(f"{name}_blocks",), packing=Blocks(), axis=plain.axis, rows=plain.rows),),
        "scales": (Source(names=(f"{name}_scales",), packing=Powers(), axis=plain.axis, rows=plain.rows),),
    }
