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
    if (reason := _misfit(config, model)) is not None:
        return WeightChoice(
            config=plain, model=model, line=f"the checkpoint's own weights, not {CPU_DEFAULT}: {reason}"
        )
    format = named_format(CPU_DEFAULT)
    keep = f"--quantization={PLAIN} or --dtype={model.dtype} keeps the checkpoint's own"
    return WeightChoice(
        config=config.replace(quantization=CPU_DEFAULT),
        model=with_formats(model, uniformly(format)),
        format=format,
        line=f"{CPU_DEFAULT} weights (the default on a CPU; {keep})",
    )


def _misfit(config: RuntimeConfig, model: ModelConfig) -> str | None:
    """Why the default is not for this model or this config."""
    if not config.store and config.weights != "resident":
        return f"with store off, weights={config.weights} reads a store as it is"
    try:
        with_formats(model, uniformly(named_format(CPU_DEFAULT)))
    except ConfigError as error:
        return str(error)
    return None
