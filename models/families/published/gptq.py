"""GPTQ: 4 or 8 bits, as AutoGPTQ and GPTQModel publish them (checkpoint_format "gptq" and "gptq_v2")."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from ....pallas_kernels.quantized_matmul.contract import WeightFormat
from ..reader import ConfigReader, agreed
from ..source import Source
from .packing import Companion, GroupOrder, MiddleZeros, NoBias, PackedInputs, Scales, ZeroPoints
from .scheme import Modules, Projection, Scheme, beside
from .shared import packed_integers, read_bits, read_group

DEFAULTS = {"desc_act": False, "group_size": 128, "lm_head": False, "sym": True}
# How the weights were found, and how other front ends run them. That inputs are in order is seen from g_idx.
HARMLESS = tuple(
    """
    act_group_aware amp autoround_version backend batch_size block_name_to_quantize cache_block_outputs
    damp_auto_increment damp_percent dataset desc_act disable_exllama enable_minmax_tuning enable_norm_bias_tuning
    enable_quanted_input exllama_config gradient_accumulate_steps iters low_gpu_mem_usage lr max_input_length meta
    minmax_lr model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block mse nsamples
    pad_token_id scale_dtype seqlen static_groups tokenizer true_sequential use_cuda_fp16 use_exllama v2_alpha
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the tensors' numbers stand for."""

    bits: Literal[4, 8]
    symmetric: bool
    stored_less: int  # what is taken off the zero points before they are stored

    def spellings(self, projection: Projection, plain: Source) -> Mapping[str, tuple[Source, ...]]:
        """Versions of the tools write g_idx or not, and a bias of zeros where the model has none."""
        format = projection.format
        zeros: dict[str, Companion] = {".qzeros": MiddleZeros(bits=self.bits)} if self.symmetric else {}
        order: dict[str, Companion] = {".g_idx": GroupOrder(group=format.group)}
        bias: dict[str, Companion] = {".bias": NoBias()}

        def scales(companions: Mapping[str, Companion]) -> Source:
            packing = Scales(dtype=format.scale, groups_first=True, companions=tuple(companions.values()))
            return beside(plain, ".scales", *companions, packing=packing)

        versions = [zeros | order | bias, zeros | bias] if not projection.bias else []
        return {
            "weight": (beside(plain, ".qweight", packing=PackedInputs(bits=self.bits, words_first=True)),),
            "scales": tuple(scales(each) for each in (*versions, zeros | order, zeros)),
            "zeros": (beside(plain, ".qzeros", packing=ZeroPoints(stored_less=self.stored_less)),),
        }


def read(section: ConfigReader, dtype: str) -> Scheme:
    """One format for all linear layers, or those of modules_in_block_to_quantize; for the head if `lm_head` says so."""
    section.ignore(*HARMLESS)
    section.expect("dynamic", {}, False)  # formats of single modules
    section.expect("is_marlin_format", False)
    section.expect("pack_dtype", "int32")
    section.expect("data_type", "int")
    section.expect("hyb_act", False)
    section.expect("v2", False)  # a way of finding weights, not the format gptq_v2
    symmetric, bits = section.flag("sym"), read_bits(section, 4, 8)
    if bits == 8 and not symmetric:
        raise section.wrong("sym", "true where 'bits' is 8")
    layout = Layout(bits=4 if bits == 4 else 8, symmetric=symmetric, stored_less=_read_stored_less(section))
    format = packed_integers(bits, read_group(section), dtype, zeros=not symmetric)
    with_head, only = section.flag("lm_head"), _read_inner_modules(section)
    head = Modules(frozenset({"lm_head"}))

    def format_of(modules: Sequence[str]) -> WeightFormat | None:
        if any(module in head for module in modules):
            return format if with_head else None
        return format if only is None or any(module in only for module in modules) else None

    return Scheme(method="gptq", format_of=format_of, spellings=layout.spellings)


def _read_stored_less(section: ConfigReader) -> int:
    """Layout.stored_less, by the name of the layout, for which versions of the tools have different keys."""
    given = [key for key in ("checkpoint_format", "format") if section.get(key) is not None]
    agreed([(key, section.get(key)) for key in given], section.where)
    return section.choice(given[0], {"gptq": 1, "gptq_v2": 0}) if given else 1


def _read_inner_modules(section: ConfigReader) -> Modules | None:
    """The modules of modules_in_block_to_quantize, a list of lists; None for all."""
    groups = section.get("modules_in_block_to_quantize")
    if groups is None:
        return None
    is_nested = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
    names = [name for group in groups for name in group] if is_nested else []
    if not names or not all(isinstance(name, str) for name in names):
        raise section.wrong("modules_in_block_to_quantize", "a list of lists of names of modules")
    return Modules(frozenset(names))
