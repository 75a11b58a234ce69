"""Quantized checkpoints as they are published: for each quant_method what its config.json and its tensors mean."""

from collections.abc import Callable, Mapping
from typing import Any

from ..reader import ConfigReader
from . import awq, compressed_tensors, fp8, gptq, mxfp4
from .scheme import Scheme

_MODULES = {
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "gptq": gptq,
    "mxfp4": mxfp4,
}

# By quant_method: the keys' defaults, and the reader of the section for a model of a dtype.
PUBLISHED: Mapping[str, tuple[Mapping[str, Any], Callable[[ConfigReader, str], Scheme]]] = {
    name: (module.DEFAULTS, module.read) for name, module in _MODULES.items()
}
