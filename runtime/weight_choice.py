"""What plain weights are made where neither dtype nor quantization is given: int8 on a CPU.

There a decode step takes about as long as its weights take to be read, and int8 ones are half of 16 bits. What that
costs in quality is README's table of `millrace eval-quant`. On a GPU weights stay as the checkpoint has them.
"""

import dataclasses

from ..errors import ConfigError
from ..models.config import ModelConfig
from ..models.quantization import is_quantized, named_format, uniformly, with_formats
from ..pallas_kernels.dispatch import Platform
from ..pallas_kernels.quantized_matmul import WeightFormat
from .config import PLAIN, RuntimeConfig

CPU_DEFAULT = "int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightChoice:
    """What a config with an open quantization comes to on its devices."""

    config: RuntimeConfig  # its quantization is no longer open
    model: ModelConfig  # as it runs
    format: WeightFormat | None = None  # what plain weights are made by this choice; None: it changes nothing
    line: str | None = None  # what the user is told; None where nothing is different from the checkpoint


def choose_weights(config: RuntimeConfig, model: ModelConfig, platform: Platform) -> WeightChoice:
    """The one place where an open quantization is decided; `model` is as its checkpoint and the config have it."""
    if config.quantization is not None:
        return WeightChoice(config=config, model=model)
    plain = config.replace(quantization=PLAIN)
    if platform != "cpu" or config.dtype is not None or is_quantized(model):
        return WeightChoice(config=plain, model=model)
    format = named_format(CPU_DEFAULT)
    try:
        quantized = _with_default(config, model, format)
    except ConfigError as misfit:
        return WeightChoice(
            config=plain, model=model, line=f"the checkpoint's own weights, not {CPU_DEFAULT}: {misfit}"
        )
    keep = f"--quantization={PLAIN} or --dtype={model.dtype} keeps the checkpoint's own"
    return WeightChoice(
        config=config.replace(quantization=CPU_DEFAULT),
        model=quantized,
        format=format,
        line=f"{CPU_DEFAULT} weights (the default on a CPU; {keep})",
    )


def _with_default(config: RuntimeConfig, model: ModelConfig, format: WeightFormat) -> ModelConfig:
    """The model in the default's format; raises ConfigError where the default is not for it or for the config."""
    if not config.store and config.weights != "resident":
        raise ConfigError(f"with store off, weights={config.weights} reads a store as it is")
    return with_formats(model, uniformly(format))
